"""DeepSpeed's own checkpoints become ours, ours become universal ones: the training goes on all the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.backends.stored_worker import MIDDLE, STEPS, spec_of
from tests.conformance.resume_worker import run_leg
from tests.jobs import run_job
from xtrain.checkpoints.export import export
from xtrain.checkpoints.foreign import Form, import_state
from xtrain.checkpoints.format import Checkpoint, complete_checkpoints
from xtrain.contract import Job
from xtrain.spec import dump_spec

pytestmark = pytest.mark.slow

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""In bf16 two processes add up in another order than one."""


class Saved(NamedTuple):
    """A checkpoint of DeepSpeed's own."""

    stage: int
    world: int
    precision: str = "fp32"
    universal: bool = False
    """Whether DeepSpeed's tool makes it universal too."""

    def __str__(self) -> str:
        return f"{self.stage}x{self.world}-{self.precision}"


FIRST, ROUNDED = Saved(1, 2, universal=True), Saved(1, 2, "bf16")
SAVED = (Saved(0, 1), FIRST, Saved(2, 2), Saved(3, 2, universal=True), ROUNDED)
LOADED = (1, 2, 3)
"""Stages that load ours, on one process."""


class Jobs:
    """DeepSpeed at work: first two processes that save, then one that saves, and loads what we wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses = self.start([self.part(saved) for saved in SAVED if saved.world == 2], 2)
        self.written = folder / "ours"
        export(self.imported(FIRST, "deepspeed"), "ds-universal", "fp32", self.written)
        parts = [self.part(saved) for saved in SAVED if saved.world == 1]
        for stage in LOADED:
            asked = {"stage": stage}
            parts.append({"name": f"load-{stage}", "do": "load", "folder": str(self.written), "asked": asked})
        self.losses |= self.start(parts, 1)

    def part(self, saved: Saved) -> dict[str, Any]:
        asked = {"stage": saved.stage, "precision": saved.precision, "universal": saved.universal}
        return {"name": str(saved), "do": "save", "folder": str(self.folder / str(saved)), "asked": asked}

    def start(self, plan: Sequence[dict[str, Any]], world: int) -> dict[str, list[float]]:
        place = self.folder / f"job-{world}"
        place.mkdir()
        (place / "plan.json").write_text(json.dumps(plan))
        run_job(world, "tests.backends.stored_worker", place / "plan.json", place / "losses.json")
        found: dict[str, list[float]] = json.loads((place / "losses.json").read_text())
        return found

    def imported(self, saved: Saved, form: Form) -> Checkpoint:
        """As `xtrain checkpoint import` makes it."""
        source = self.folder / str(saved) / ("universal" if form == "ds-universal" else "")
        out = self.folder / f"imported-{saved}-{form}"
        if out.exists():
            return complete_checkpoints(out / "checkpoints")[0]
        return import_state(source, form, spec_of(saved.stage, saved.world, saved.precision), out).checkpoint

    def gone_on(self, checkpoint: Checkpoint, precision: str = "fp32") -> list[float]:
        """The losses after it, on cpu."""
        spec = dump_spec(spec_of(0, 1, precision))
        leg = {"backend": "cpu", "spec": spec, "folder": str(checkpoint.path.parent), "stop": STEPS}
        losses: list[float] = run_leg(leg, Job())["losses"]
        return losses


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("stored"))


def difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) == STEPS - MIDDLE
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("saved", SAVED, ids=str)
def test_a_checkpoint_of_deepspeeds_own_goes_on_here(jobs: Jobs, saved: Saved) -> None:
    checkpoint = jobs.imported(saved, "deepspeed")
    checkpoint.check(hashes=True)
    assert checkpoint.step == MIDDLE
    gone_on = jobs.gone_on(checkpoint, saved.precision)
    assert difference(gone_on, jobs.losses[str(saved)]) <= TOLERANCE[saved.precision]


def test_weights_in_16_bits_are_imported_as_their_masters(jobs: Jobs) -> None:
    """Those that the model computes with are rounded: to go on from them would lose what was learned."""
    weight = (
        jobs.imported(ROUNDED, "deepspeed").reader().read("blocks.0.feed_forward.expansion.weight", "weight")
    )
    assert weight is not None
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("saved", [saved for saved in SAVED if saved.universal], ids=str)
def test_a_universal_checkpoint_that_deepspeed_made_goes_on_here(jobs: Jobs, saved: Saved) -> None:
    checkpoint = jobs.imported(saved, "ds-universal")
    assert difference(jobs.gone_on(checkpoint), jobs.losses[str(saved)]) <= TOLERANCE["fp32"]


@pytest.mark.parametrize("stage", LOADED)
def test_a_universal_checkpoint_that_we_made_goes_on_in_deepspeed(jobs: Jobs, stage: int) -> None:
    """It came from stage 1 on two processes, by way of a checkpoint of ours."""
    assert difference(jobs.losses[f"load-{stage}"], jobs.losses[str(FIRST)]) <= TOLERANCE["fp32"]
