"""Trains with state on a drive, stops, and goes on elsewhere: what the drive tests compare.

    python -m tests.backends.drive_worker OUT.json DRIVE_FOLDER

or the same on two processes (tests/jobs.py).
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.whole_state import whole_state
from xtrain import registry
from xtrain.contract import Job, StateKind, StepInput
from xtrain.data import open_data
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec

STEPS, MIDDLE = 6, 3
BF16 = {"dtype": "bf16", "weights": "bf16"}
Memory = dict[str, Any]


class Kept:
    """An engine's state, on every rank, for another to read."""

    def __init__(self, engine: Any) -> None:
        self.tensors = whole_state(engine)
        self.extras = engine.extras()

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        return self.tensors.get((name, kind))


def make_spec(memory: Memory, precision: Any) -> Spec:
    return Spec.model_validate(
        {
            "model": {"preset": "gpt2-nano", "layers": 2, "hidden": 512, "heads": 8, "positions": 64},
            "data": {"source": "synthetic", "seq_len": 16, "tokens": 20_000},
            "batch": {"global": 4, "micro": 2},
            "train": {"steps": STEPS},
            "optimizer": {"lr": 2e-3},
            "precision": precision,
            "memory": memory,
        }
    )


def leg(
    backend: str, spec: Spec, job: Job, drive: Path, stop: int = STEPS, start: Kept | None = None
) -> dict[str, Any]:
    data = open_data(spec, show_progress=False)
    lane = registry.load(backend)
    engine: Any = lane.start(lane.resolve(spec, job.world), model_source(spec, data.vocab_size), job)
    if start is not None:
        engine.import_state(start)
        engine.restore_extras(start.extras)
    results = []
    for step in range(MIDDLE if start else 0, stop):
        batches = data.micro_batches(step, engine.data_rank, engine.data_size)
        stepped = StepInput(step, batches, spec.optimizer.lr, data.target_tokens(step))
        results.append(engine.train_step(stepped, None, NullTrace()))
    swapped = sum(file.stat().st_size for file in drive.rglob("*") if file.is_file())
    values = engine.fetch(results)
    found = {
        "losses": [value.loss for value in values],
        "norms": [value.grad_norm for value in values],
        "swapped": swapped,
        "state": Kept(engine),
    }
    engine.close()
    return found


def plain(precision: Any, drive: Path) -> dict[str, Any]:
    """The same training by the plain CPU engine, with nothing on a drive."""
    found = leg("cpu", make_spec({}, precision), Job(), drive)
    return {"losses": found["losses"], "norms": found["norms"]}


def run(places: dict[str, str], drive: Path, job: Job, precision: Any = "fp32") -> dict[str, Any]:
    """Half of a training with these things on the drive, the rest there and on the plain CPU engine."""
    target = {"device": "nvme", "path": str(drive)}
    offload = {what: target if place == "nvme" else place for what, place in places.items()}
    spec = make_spec({"sharding": "parameters", "offload": offload}, precision)
    first = leg("deepspeed", spec, job, drive, MIDDLE)
    here = leg("deepspeed", spec, job, drive, start=first["state"])
    elsewhere = leg("cpu", make_spec({}, precision), Job(), drive, start=first["state"])
    return {
        "losses": first["losses"] + here["losses"],
        "norms": first["norms"] + here["norms"],
        "moved": first["losses"] + elsewhere["losses"],
        "swapped": first["swapped"],
        "left": [str(path) for path in drive.iterdir()] if job.world == 1 else [],
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    out, drive = Path(sys.argv[1]), Path(sys.argv[2])
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    job = Job(rank, rank, world, world)
    both = {"optimizer": "nvme", "parameters": "nvme"}
    report = {"both": run(both, drive, job), "both, bf16": run(both, drive, job, BF16)}
    if world == 1:
        report["optimizer"] = run({"optimizer": "nvme"}, drive, job)
        report["parameters"] = run({"parameters": "nvme", "optimizer": "cpu"}, drive, job)
        report["plain"], report["plain, bf16"] = plain("fp32", drive), plain(BF16, drive)
    if rank == 0:
        out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
