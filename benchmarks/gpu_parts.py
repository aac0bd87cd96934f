"""The parts of `make gpu`, in the order in which they are run. Each yields its rows as they come."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.gpu_lanes import Bench, Row
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


@dataclass(frozen=True)
class Part:
    name: str
    about: str
    rows: Callable[[Bench], Iterator[Row]]


def speed(bench: Bench) -> Iterator[Row]:
    part, load = "speed", _sized(bench, GPT2)
    train = {"steps": load.steps, "seed": load.seed, "clip": load.clip}
    pairs = [(False, ""), (True, ", compiled")]
    for compiled, suffix in pairs:
        if compiled and bench.tiny:
            yield Row(part, f"both{suffix}", "left out: compiling takes longer than the whole of a trial")
            continue
        plain = bench.plain(part, f"plain loop{suffix}", load, 100, compiled)
        yield plain
        ours = bench.xtrain(
            part,
            f"xtrain{suffix}",
            load,
            100,
            every_steps=EVERY_STEPS,
            train={**train, "compile": compiled},
        )
        yield _against(ours, plain)


def large(bench: Bench) -> Iterator[Row]:
    part, load = "large", _sized(bench, LARGE)
    compiled = not bench.tiny
    train = {"steps": load.steps, "seed": load.seed, "clip": load.clip, "compile": compiled}
    name = "xtrain, compiled" if compiled else "xtrain"
    yield bench.xtrain(part, name, load, 90, every_steps=EVERY_STEPS, train=train)


def ladder(bench: Bench) -> Iterator[Row]:
    """Each rung adds to the one before; the first one is what the others are a share of."""
    part, load = "ladder", replace(_sized(bench, RUNG), precision="fp32")
    away = max(1, load.layers // 9)
    whole = {"loss_chunk": "none"}
    small = {"global": load.global_batch, "micro": 1}
    recomputed = {**whole, "checkpointing": "auto"}
    lean = {
        "checkpointing": "auto",
        "loss_chunk": "auto",
        "offload": {"optimizer": "cpu", "gradients": "cpu"},
    }
    rungs: list[tuple[str, dict[str, Any]]] = [
        ("plain fp32", {"memory": whole}),
        ("+ bf16 autocast", {"memory": whole, "precision": "bf16"}),
        ("+ accumulation, micro 1", {"memory": whole, "precision": "bf16", "batch": small}),
        ("+ checkpointing", {"memory": recomputed, "precision": "bf16", "batch": small}),
        (
            "+ 16-bit weights, chunked loss, offload",
            {"memory": lean, "precision": HALF_WEIGHTS, "batch": small},
        ),
        (
            f"+ {away} of {load.layers} layers on the CPU",
            {
                "memory": lean,
                "precision": HALF_WEIGHTS,
                "batch": small,
                "manual": {"devices": ["main", "cpu"], "split": [load.layers - away, away]},
            },
        ),
    ]
    first: Row | None = None
    for name, changes in rungs:
        row = bench.xtrain(part, name, load, 60, **changes)
        first = first or row
        yield _against(row, first)


def deepspeed(bench: Bench) -> Iterator[Row]:
    part, load = "deepspeed", replace(_sized(bench, GPT2), steps=12, warmup=2)
    if not bench.tiny:
        load = replace(load, global_batch=8, micro_batch=8)
    yield bench.xtrain(part, bench.device, load, 60)
    for stage, sharding in SHARDING_BY_STAGE.items():
        yield bench.xtrain(
            part, f"ZeRO {stage}", load, 60, backend="deepspeed", memory={"sharding": sharding}
        )
    offloaded: list[tuple[int, tuple[str, ...]]] = [(2, ("optimizer",)), (3, ("optimizer", "parameters"))]
    for stage, what in offloaded:
        memory = {"sharding": SHARDING_BY_STAGE[stage], "offload": dict.fromkeys(what, "cpu")}
        name = f"ZeRO {stage}, {' and '.join(what)} on the CPU"
        yield bench.xtrain(part, name, load, 60, backend="deepspeed", memory=memory)


def pause(bench: Bench) -> Iterator[Row]:
    part, name = "checkpoint pause", f"{bench.device}, background save"
    command = ["-m", "benchmarks.checkpoint_pause", "--lanes", bench.device, "--out", str(bench.folder)]
    ended = bench.call(command, 60)
    if ended.problem:
        yield Row(part, name, ended.problem)
        return
    line = [line for line in ended.output.splitlines() if line.startswith(f"| {bench.device} ")][-1]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    yield Row(part, name, "done", {"pause_seconds": float(cells[4]), "torch_save_seconds": float(cells[5])})


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
    Part("conformance", "the same training as a plain loop on the CPU", conformance),
    Part("speed", "GPT-2 124M, bf16 over fp32 weights, beside a plain loop", speed),
    Part("large", "GPT-2 Large, bf16 over fp32 weights", large),
    Part("ladder", "GPT-2 Large, 4 sequences of 1024 an update, rung by rung", ladder),
    Part("deepspeed", "GPT-2 124M, bf16, under DeepSpeed on one GPU", deepspeed),
    Part("checkpoint pause", "how long training stands still for a save", pause),
]


def _sized(bench: Bench, load: Workload) -> Workload:
    return TINY if bench.tiny else load


def _against(row: Row, base: Row) -> Row:
    """With speed and memory as shares of another row's."""
    shares = {}
    for key, share in (("tokens_per_second", "speed_share"), ("peak_bytes", "memory_share")):
        ours, theirs = row.figures.get(key), base.figures.get(key)
        shares[share] = ours / theirs if ours and theirs else None
    return replace(row, figures={**row.figures, **shares})
