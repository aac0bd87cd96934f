"""Real DeepSpeed writes checkpoints of its own, and loads one that xtrain wrote; what came before and after.

    python -m tests.backends.stored_worker PLAN.json OUT.json

or the same under torch.distributed.run. A part of the plan says what: `save` into a folder in the middle of a
training, or `load` from one there.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.conformance.cases import SHARDING, Lane, Training
from xtrain import registry
from xtrain.contract import Job, StepInput
from xtrain.data import open_data
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec

STEPS, MIDDLE = 6, 3
PRECISIONS: dict[str, Any] = {"fp32": "fp32", "bf16": {"dtype": "bf16", "weights": "bf16"}}


def spec_of(stage: int, world: int, precision: str) -> Spec:
    lane = Lane("deepspeed", SHARDING[stage], world)
    return Spec.model_validate(Training("adamw", steps=STEPS, precision=PRECISIONS[precision]).on(lane).spec)


class Trainer:
    """A DeepSpeed engine as xtrain starts it, and its losses."""

    def __init__(self, stage: int, job: Job, precision: str = "fp32", universal: bool = False) -> None:
        self.spec = spec_of(stage, job.world, precision)
        self.data = open_data(self.spec, show_progress=False)
        backend = registry.load("deepspeed")
        resolved = backend.resolve(self.spec, job.world)
        if universal:
            config: Any = {**resolved.settings["ds_config"], "checkpoint": {"load_universal": True}}  # type: ignore[dict-item]
            resolved = replace(resolved, settings={**resolved.settings, "ds_config": config})
        self.engine: Any = backend.start(resolved, model_source(self.spec, self.data.vocab_size), job)

    def train(self, start: int, stop: int) -> list[float]:
        rate, results = learning_rate(self.spec), []
        for step in range(start, stop):
            batches = self.data.micro_batches(step, self.engine.data_rank, self.engine.data_size)
            given = StepInput(step, batches, rate(step), self.data.target_tokens(step))
            results.append(self.engine.train_step(given, None, NullTrace()))
        return [values.loss for values in self.engine.fetch(results)]


def save(job: Job, folder: Path, stage: int, precision: str, universal: bool) -> list[float]:
    """DeepSpeed's own checkpoint after MIDDLE updates, and perhaps a universal one, by its tool."""
    trainer = Trainer(stage, job, precision)
    trainer.train(0, MIDDLE)
    trainer.engine.engine.save_checkpoint(str(folder), tag="middle")
    losses = trainer.train(MIDDLE, STEPS)
    trainer.engine.close()
    if job.rank == 0 and universal:
        convert(folder / "middle", folder / "universal")
    return losses


def convert(native: Path, universal: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main as to_universal

    to_universal(
        Namespace(
            input_folder=str(native),
            output_folder=str(universal),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def load(job: Job, folder: Path, stage: int) -> list[float]:
    """Losses after the universal checkpoint in `folder` was loaded by DeepSpeed."""
    trainer = Trainer(stage, job, universal=True)
    trainer.engine.engine.load_checkpoint(str(folder))
    for state in trainer.engine.optimizer.state.values():
        # DeepSpeed 0.19.8 gives all groups of stage 3 one tensor, which is then counted up once for each.
        state["step"] = state["step"].clone()
    losses = trainer.train(MIDDLE, STEPS)
    trainer.engine.close()
    return losses


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    plan, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    job = Job(rank, rank, world, world)
    do: dict[str, Callable[..., list[float]]] = {"save": save, "load": load}
    losses = {part["name"]: do[part["do"]](job, Path(part["folder"]), **part["asked"]) for part in plan}
    if rank == 0:
        out.write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
