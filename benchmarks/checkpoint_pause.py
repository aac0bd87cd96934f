"""How long training stands still for a save, beside a plain `torch.save` of the same state.

    python -m benchmarks.checkpoint_pause [--lanes cpu,zero3x2] [--saves 8] [--out FOLDER] [--page MARKDOWN]

Each lane is a fresh job. Its engine takes two updates, so that there are moments; then it saves in the
background as `xtrain run` does. The pause is the time inside Checkpointer.save, from a barrier to this rank's
return; between saves the writing is waited for, outside the clock. The first save makes the buffers and is
told apart. torch.save writes what this rank writes, into the same folder, without fsync; the two take turns,
and what either wrote is on the disk before the next begins. Medians over saves; the most over ranks.
--page puts the table where the page has it, a line that begins with "| lane |" and those below it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.arguments import at_least, folder
from xtrain import registry
from xtrain.checkpoints.manager import Checkpointer
from xtrain.checkpoints.shares import plan_files
from xtrain.contract import Engine, Job, StepInput
from xtrain.data import open_data
from xtrain.measure.machine import environment, reset_peak_resident, resident_bytes
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.plan.saves import background_copy_bytes
from xtrain.spec.tree import Spec

SHARDING = ("none", "optimizer", "gradients", "parameters")
LANES = {"cpu": ("cpu", 0, 1), "cuda": ("cuda", 0, 1)} | {
    f"zero{stage}x{world}": ("deepspeed", stage, world) for world in (1, 2) for stage in range(4)
}
MIB = 1 << 20
BAR = 0.25
"""Of torch.save's time, at most."""


SMALL = {"preset": "gpt2-nano", "layers": 6, "hidden": 512, "heads": 8}


def spec_of(stage: int, model: dict[str, Any]) -> Spec:
    return Spec.model_validate(
        {
            "model": model,
            "data": {"source": "synthetic", "seq_len": 16, "tokens": 20_000},
            "batch": {"global": 2, "micro": 1},
            "train": {"steps": 10},
            "optimizer": {"name": "adamw", "lr": 1e-4},
            "checkpoint": {"background": True, "keep": 1},
            "memory": {"sharding": SHARDING[stage]},
        }
    )


def measure(lane: str, folder: Path, saves: int) -> dict[str, Any]:
    """Seconds and bytes of this rank."""
    name, stage, world = LANES[lane]
    rank = int(os.environ.get("RANK", "0"))
    job = Job(rank, rank, world, world)
    spec = spec_of(stage, {"preset": "gpt2"} if name == "cuda" else SMALL)
    data = open_data(spec, show_progress=False)
    backend = registry.load(name)
    resolved = backend.resolve(spec, world)
    engine = backend.start(resolved, model_source(spec, data.vocab_size), job)
    for step in range(2):
        batches = data.micro_batches(step, engine.data_rank, engine.data_size)
        engine.train_step(StepInput(step, batches, 1e-4, data.target_tokens(step)), None, NullTrace())
    own = folder if rank == 0 else None
    checkpointer = Checkpointer(
        spec.checkpoint,
        resolved,
        "",
        None,
        own,
        lambda text: print(text, file=sys.stderr),
        lambda: None,
        rank,
    )
    reset_peak_resident()
    before = resident_bytes().bytes
    pauses = [pause(engine, checkpointer, 1)]
    extra = (resident_bytes().peak_bytes or 0) - before
    plain = []
    for step in range(2, saves + 2):
        pauses.append(pause(engine, checkpointer, step))
        plain.append(plain_save(engine, world, rank, folder))
    checkpointer.close()
    engine.close()
    return {
        "first_seconds": pauses[0],
        "pause_seconds": pauses[1:],
        "torch_save_seconds": plain,
        "share_bytes": checkpointer.buffers.bytes,
        "predicted_bytes": background_copy_bytes(spec, engine.parameter_count, world),
        "extra_resident_bytes": extra,
    }


def pause(engine: Engine, checkpointer: Checkpointer, step: int) -> float:
    settle(engine)
    started = time.perf_counter()
    checkpointer.save(engine, step, last=False)
    seconds = time.perf_counter() - started
    writing = checkpointer.writing
    assert writing is not None
    writing.join()
    if writing.problem:
        raise SystemExit(writing.problem)
    return seconds


def settle(engine: Engine) -> None:
    """Everything that was written before is on the disk, and all ranks are here."""
    os.sync()
    engine.gather(None)


def plain_save(engine: Engine, world: int, rank: int, folder: Path) -> float:
    """The export is not in the time: only the writing is compared."""
    import torch

    owners = plan_files(engine.state_layout(), world).owners
    state = {(piece.name, piece.kind): piece.value for piece in engine.export_state(owners.__getitem__)}
    settle(engine)
    started = time.perf_counter()
    torch.save(state, folder / f"plain-{rank}.pt")
    return time.perf_counter() - started


def run_lane(lane: str, saves: int) -> dict[str, Any]:
    """A fresh job; the most over its ranks."""
    world = LANES[lane][2]
    with tempfile.TemporaryDirectory(prefix="pause-", dir=os.environ.get("XTRAIN_BENCH_FOLDER")) as name:
        module = ["-m", "benchmarks.checkpoint_pause", "--worker", lane, "--out", name, "--saves", str(saves)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [sys.executable, "-W", "ignore", *(launcher if world > 1 else []), *module]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ranks = [json.loads(path.read_text()) for path in sorted(Path(name).glob("rank-*.json"))]
    found = {
        "lane": lane,
        "share_mib": max(r["share_bytes"] for r in ranks) / MIB,
        "predicted_mib": max(r["predicted_bytes"] for r in ranks) / MIB,
        "extra_mib": max(r["extra_resident_bytes"] for r in ranks) / MIB,
        "first_s": max(r["first_seconds"] for r in ranks),
        "pause_s": max(statistics.median(r["pause_seconds"]) for r in ranks),
        "torch_save_s": max(statistics.median(r["torch_save_seconds"]) for r in ranks),
    }
    return {**found, "ratio": found["pause_s"] / found["torch_save_s"]}


def table(lanes: Sequence[Mapping[str, Any]]) -> str:
    """As docs/checkpoints.md has it. The first results did not say what was predicted."""
    from tabulate import tabulate

    rows = [
        {
            "lane": lane["lane"],
            "kept for the copy": f"{lane['share_mib']:.1f} MiB",
            "predicted": f"{lane['predicted_mib']:.1f} MiB" if "predicted_mib" in lane else "-",
            "resident set grows by": f"{lane['extra_mib']:.0f} MiB",
            "pause": f"{1e3 * lane['pause_s']:.0f} ms",
            "torch.save": f"{1e3 * lane['torch_save_s']:.0f} ms",
            "of it": f"{lane['ratio']:.2f}{'' if lane['ratio'] <= BAR else ': misses the bar'}",
        }
        for lane in lanes
    ]
    align = ("left", *["right"] * 6)
    return tabulate(rows, headers="keys", tablefmt="pipe", colalign=align, disable_numparse=True)


def with_table(page: str, new: str) -> str:
    """ValueError where the page has no such table."""
    head, found, rest = page.partition("\n| lane ")
    if not found:
        raise ValueError("the page has no table that begins with | lane |")
    return f"{head}\n{new}\n\n{rest.partition(chr(10) * 2)[2]}"


def lanes_of(text: str) -> list[str]:
    """An argument that names lanes."""
    names = text.split(",")
    if unknown := [name for name in names if name not in LANES]:
        raise argparse.ArgumentTypeError(f"found {unknown[0]!r}, expected some of {', '.join(LANES)}")
    return names


def page_with_table(text: str) -> Path:
    """An argument that is a page whose table can be replaced."""
    try:
        with_table(Path(text).read_text(), "")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error
    return Path(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=folder)
    parser.add_argument("--page", type=page_with_table)
    parser.add_argument("--lanes", type=lanes_of, default=",".join(lane for lane in LANES if lane != "cuda"))
    parser.add_argument("--saves", type=at_least(1), default=8)
    parser.add_argument("--worker", choices=LANES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.worker:
        found = measure(options.worker, options.out, options.saves)
        (options.out / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(found))
        return
    rows = [run_lane(lane, options.saves) for lane in options.lanes]
    print(table(rows))
    date = datetime.now(UTC).date().isoformat()
    report = {"date": date, "saves": options.saves, "environment": environment(), "lanes": rows}
    if options.page:
        options.page.write_text(with_table(options.page.read_text(), table(rows)))
    if options.out:
        (options.out / f"checkpoint-pause-{date}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
