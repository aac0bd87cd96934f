"""Trains with state on a drive, stops, and goes on elsewhere: what the drive tests compare.

python -m tests.backends.drive_worker OUT.json DRIVE_FOLDER
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from tests.whole_state import whole_state
from xtrain import registry
from xtrain.contract import Job, StateKind, StepInput
from xtrain.data import open_data
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec
from xtrain.trace import NullTrace

STEPS, MIDDLE = 6, 3
Memory = dict[str, Any]


class Kept:
    """An engine's state, for another to read."""

    def __init__(self, engine: Any) -> None:
        self.tensors = whole_state(engine)
        self.extras = engine.extras()

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        return self.tensors.get((name, kind))


def make_spec(memory: Memory) -> Spec:
    return Spec.model_validate(
        {
            "model": {"preset": "gpt2-nano", "layers": 2, "hidden": 512, "heads": 8, "positions": 64},
            "data": {"source": "synthetic", "seq_len": 16, "tokens": 20_000},
            "batch": {"global": 4, "micro": 2},
            "train": {"steps": STEPS},
            "optimizer": {"lr": 2e-3},
            "memory": memory,
        }
    )


def leg(backend: str, memory: Memory, drive: Path, stop: int, start: Kept | None = None) -> dict[str, Any]:
    spec = make_spec(memory)
    data = open_data(spec, show_progress=False)
    lane = registry.load(backend)
    engine: Any = lane.start(lane.resolve(spec, 1), model_source(spec, data.vocab_size), Job())
    if start is not None:
        engine.import_state(start)
        engine.restore_extras(start.extras)
    results = []
    for step in range(MIDDLE if start else 0, stop):
        batches = data.micro_batches(step, 0, 1)
        stepped = StepInput(step, batches, spec.optimizer.lr, data.target_tokens(step))
        results.append(engine.train_step(stepped, None, NullTrace()))
    swapped = sum(file.stat().st_size for file in drive.rglob("*") if file.is_file())
    found = {"losses": [v.loss for v in engine.fetch(results)], "swapped": swapped, "state": Kept(engine)}
    engine.close()
    return found


def run(places: dict[str, str], drive: Path) -> dict[str, Any]:
    """Half of a training with these things on the drive, the rest there and on the plain CPU engine."""
    target = {"device": "nvme", "path": str(drive)}
    offload = {what: target if place == "nvme" else place for what, place in places.items()}
    memory = {"sharding": "parameters", "offload": offload}
    first = leg("deepspeed", memory, drive, MIDDLE)
    here = leg("deepspeed", memory, drive, STEPS, first["state"])
    elsewhere = leg("cpu", {}, drive, STEPS, first["state"])
    return {
        "losses": first["losses"] + here["losses"],
        "moved": first["losses"] + elsewhere["losses"],
        "swapped": first["swapped"],
        "left": [str(path) for path in drive.iterdir()],
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    out, drive = Path(sys.argv[1]), Path(sys.argv[2])
    report = {
        "plain": leg("cpu", {}, drive, STEPS)["losses"],
        "optimizer": run({"optimizer": "nvme"}, drive),
        "parameters": run({"parameters": "nvme", "optimizer": "cpu"}, drive),
        "both": run({"optimizer": "nvme", "parameters": "nvme"}, drive),
    }
    out.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
