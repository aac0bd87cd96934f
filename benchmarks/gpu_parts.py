"""The parts of `make gpu`, in the order in which they are run. Each yields its rows as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu_lanes import Bench, Figures, Row
from benchmarks.workload import SHARDING_BY_STAGE, Workload

PADDED_VOCABULARY = 50_304
"""50,257 rounded up to a multiple of 64: matrix products like it better."""
GPT2 = Workload(
    12,
    768,
    12,
    1024,
    global_batch=32,
    micro_batch=32,
    steps=35,
    precision="bf16",
    vocab_size=PADDED_VOCABULARY,
)
LARGE = Workload(
    36,
    1280,
    20,
    1024,
    global_batch=8,
    micro_batch=8,
    steps=14,
    precision="bf16",
    vocab_size=PADDED_VOCABULARY,
)
RUNG = replace(LARGE, global_batch=4, micro_batch=4, steps=9, precision="fp32", warmup=2)
TINY = Workload(2, 64, 2, 64, global_batch=4, micro_batch=4, steps=9, precision="bf16", warmup=2)
HALF_WEIGHTS = {"dtype": "bf16", "weights": "bf16"}
CONFORMANCE = "tests/conformance/test_parity.py"
EVERY_STEPS = 20
"""Between two looks at the losses, where speed is measured: each is a synchronisation."""
LOSS_CHUNK = 8192
"""Tokens. With this vocabulary `auto` takes 667, for little memory: then the head's gradient, 155 MB, is gone
through 49 times a step."""


@dataclass(frozen=True)
class Part:
    name: str
    about: str
    seconds: float
    """Its share of the time: what the parts before it leave of theirs is its too."""
    rows: Callable[[Bench], Iterator[Row]]


def ends(parts: Sequence[Part], seconds: float) -> list[float]:
    """Seconds after the beginning at which each part must be over, the last one at `seconds`."""
    whole = sum(part.seconds for part in parts)
    over = [sum(part.seconds for part in parts[: place + 1]) for place in range(len(parts))]
    return [seconds * one / whole for one in over]


def rows_of(part: Part, bench: Bench) -> Iterator[Row]:
    """Of a part; one that breaks off leaves the rows it has, and a row that says why."""
    try:
        yield from part.rows(bench)
    except Exception as error:  # the parts after it go on
        yield Row(part.name, "the rest of it", f"failed: {type(error).__name__}: {error}".splitlines()[0])


def speed(bench: Bench) -> Iterator[Row]:
    """The compiled pair first: it is what the bars ask about."""
    part, load = "speed", _sized(bench, GPT2)
    train = {"steps": load.steps, "seed": load.seed, "clip": load.clip}
    for compiled, suffix, memory in ((True, ", compiled", {"loss_chunk": LOSS_CHUNK}), (False, "", {})):
        if compiled and bench.tiny:
            yield Row(part, f"both{suffix}", "left out: compiling takes longer than the whole of a trial")
            continue
        plain = bench.plain(part, f"plain loop{suffix}", load, 100, compiled)
        yield plain
        ours = bench.xtrain(
            part,
            f"xtrain{suffix}{_chunks(memory)}",
            load,
            100,
            every_steps=EVERY_STEPS,
            train={**train, "compile": compiled},
            memory=memory,
        )
        yield _against(ours, plain)


def _chunks(memory: dict[str, Any]) -> str:
    return f", loss_chunk {memory['loss_chunk']}" if memory else ""


def large(bench: Bench) -> Iterator[Row]:
    part, load = "large", _sized(bench, LARGE)
    compiled = not bench.tiny
    train = {"steps": load.steps, "seed": load.seed, "clip": load.clip, "compile": compiled}
    memory = {"loss_chunk": LOSS_CHUNK}
    name = f"xtrain{', compiled' * compiled}{_chunks(memory)}"
    yield bench.xtrain(part, name, load, 90, every_steps=EVERY_STEPS, train=train, memory=memory)


def profile(bench: Bench) -> Iterator[Row]:
    """Of the compiled lane of `speed`, which has left the compiler's cache behind."""
    part, load = "profile", replace(_sized(bench, GPT2), steps=TINY.steps)
    train = {"steps": load.steps, "seed": load.seed, "clip": load.clip, "compile": not bench.tiny}
    name = f"xtrain{', compiled' * (not bench.tiny)}{_chunks(memory := {'loss_chunk': LOSS_CHUNK})}"
    yield bench.profile(part, name, load, 60, train=train, memory=memory)


def ladder(bench: Bench) -> Iterator[Row]:
    """Each rung adds to the one before; the first one is what the others are a share of."""
    part, load = "ladder", replace(_sized(bench, RUNG), precision="fp32")
    first: Row | None = None
    for name, changes in rungs(load):
        row = bench.xtrain(part, name, load, 60, **changes)
        first = first or row
        yield _against(row, first)


def rungs(load: Workload) -> list[tuple[str, dict[str, Any]]]:
    """Names, and the sections of a spec. With blocks recomputed and the logits gone all sequences fit in one
    pass again: gradients then go to the CPU once an update."""
    away = max(1, load.layers // 9)
    whole = {"loss_chunk": "none"}
    small = {"global": load.global_batch, "micro": 1}
    recomputed = {**whole, "checkpointing": "auto"}
    lean = {
        "checkpointing": {"every": 2},
        "loss_chunk": "auto",
        "offload": {"optimizer": "cpu", "gradients": "cpu"},
    }
    return [
        ("plain fp32", {"memory": whole}),
        ("+ bf16 autocast", {"memory": whole, "precision": "bf16"}),
        ("+ accumulation, micro 1", {"memory": whole, "precision": "bf16", "batch": small}),
        ("+ checkpointing", {"memory": recomputed, "precision": "bf16", "batch": small}),
        (
            "+ 16-bit weights, chunked loss, offload, one pass in groups of 2",
            {"memory": lean, "precision": HALF_WEIGHTS},
        ),
        (
            f"+ {away} of {load.layers} layers on the CPU",
            {
                "memory": lean,
                "precision": HALF_WEIGHTS,
                "manual": {"devices": ["main", "cpu"], "split": [load.layers - away, away]},
            },
        ),
    ]


def deepspeed(bench: Bench) -> Iterator[Row]:
    """On a GPU it needs no operator of its own (torch has the optimizers); on a CPU it first compiles one."""
    part, load = "deepspeed", replace(_sized(bench, GPT2), steps=12, warmup=2)
    if not bench.tiny:
        load = replace(load, global_batch=8, micro_batch=8)
    limit = 200 if bench.tiny else 60
    yield bench.xtrain(part, bench.device, load, limit)
    for stage, sharding in SHARDING_BY_STAGE.items():
        memory: dict[str, Any] = {"sharding": sharding}
        yield bench.xtrain(part, f"ZeRO {stage}", load, limit, backend="deepspeed", memory=memory)
    offloaded: list[tuple[int, tuple[str, ...]]] = [(2, ("optimizer",)), (3, ("optimizer", "parameters"))]
    for stage, what in offloaded:
        memory = {"sharding": SHARDING_BY_STAGE[stage], "offload": dict.fromkeys(what, "cpu")}
        name = f"ZeRO {stage}, {' and '.join(what)} on the CPU"
        yield bench.xtrain(part, name, load, limit, backend="deepspeed", memory=memory)


def pause(bench: Bench) -> Iterator[Row]:
    part, name, out = "checkpoint pause", f"{bench.device}, background save", bench.folder / "pause"
    command = [
        "-m",
        "benchmarks.checkpoint_pause",
        "--lanes",
        bench.device,
        "--saves",
        "3",
        "--out",
        str(out),
    ]

    def figures(output: str) -> Figures:
        (path,) = out.glob("*.json")
        (lane,) = json.loads(path.read_text())["lanes"]
        return {"pause_seconds": lane["pause_s"], "torch_save_seconds": lane["torch_save_s"]}

    yield bench.row(part, name, command, 100, figures)


def conformance(bench: Bench) -> Iterator[Row]:
    """Of this device, against the plain loop on the CPU; all lanes and more: `pytest tests/conformance`."""
    part = "conformance"
    name = f"{CONFORMANCE}, {bench.device}"
    if bench.tiny:
        yield Row(part, name, "left out: `make test` has it on the CPU")
        return
    command = ["-m", "pytest", "-q", CONFORMANCE, "-k", bench.device, "-p", "no:cacheprovider"]
    ended = bench.call(command, 120)
    counts = re.findall(r"(\d+) (passed|failed|error|skipped)", ended.output)
    outcome = "done" if not ended.problem else ended.problem
    yield Row(part, name, outcome, {kind: int(count) for count, kind in counts})


PARTS = [
    Part("conformance", "the same training as a plain loop on the CPU", 60, conformance),
    Part("speed", "GPT-2 124M, bf16 over fp32 weights, beside a plain loop", 145, speed),
    Part("ladder", "GPT-2 Large, 4 sequences of 1024 an update, rung by rung", 130, ladder),
    Part("large", "GPT-2 Large, bf16 over fp32 weights", 55, large),
    Part("checkpoint pause", "how long training stands still for a save", 35, pause),
    Part("deepspeed", "GPT-2 124M, bf16, under DeepSpeed on one GPU", 90, deepspeed),
    Part("profile", "which kernels a step of GPT-2 124M consists of", 25, profile),
]
"""What is asked for first comes first."""


def _sized(bench: Bench, load: Workload) -> Workload:
    return TINY if bench.tiny else load


def _against(row: Row, base: Row) -> Row:
    """With speed and memory as shares of another row's."""
    shares = {}
    for key, share in (("tokens_per_second", "speed_share"), ("peak_bytes", "memory_share")):
        ours, theirs = row.figures.get(key), base.figures.get(key)
        shares[share] = ours / theirs if ours and theirs else None
    return replace(row, figures={**row.figures, **shares})
