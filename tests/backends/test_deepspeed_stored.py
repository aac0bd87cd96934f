"""DeepSpeed's own checkpoints become ours, ours become universal ones: the training goes on all the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.backends.stored_worker import MIDDLE, STEPS, spec_of
from tests.conformance.resume_worker import run_leg
from tests.jobs import run_job
from xtrain.checkpoints.export import export
from xtrain.checkpoints.foreign import Form, import_state
from xtrain.checkpoints.format import Checkpoint, complete_checkpoints
from xtrain.contract import Job
from xtrain.spec import dump_spec

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
SAVED = ((0, 1), (1, 2), (3, 2))
"""Stage and processes of DeepSpeed's own checkpoints."""
LOADED = (1, 2, 3)
"""Stages that load ours, on one process."""


class Jobs:
    """DeepSpeed at work: first two processes that save, then one that saves, and loads what we wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.losses = self.start([self.part("save", s, w) for s, w in SAVED if w == 2], 2)
        self.written = folder / "ours"
        export(self.imported(1, 2, "deepspeed"), "ds-universal", "fp32", self.written)
        parts = [self.part("save", s, w) for s, w in SAVED if w == 1]
        parts += [
            {"name": f"load-{s}", "do": "load", "stage": s, "folder": str(self.written)} for s in LOADED
        ]
        self.losses |= self.start(parts, 1)

    def part(self, do: str, stage: int, world: int) -> dict[str, Any]:
        name = f"{stage}x{world}"
        return {"name": name, "do": do, "stage": stage, "folder": str(self.folder / name)}

    def start(self, plan: Sequence[dict[str, Any]], world: int) -> dict[str, list[float]]:
        place = self.folder / f"job-{world}"
        place.mkdir()
        (place / "plan.json").write_text(json.dumps(plan))
        run_job(world, "tests.backends.stored_worker", place / "plan.json", place / "losses.json")
        found: dict[str, list[float]] = json.loads((place / "losses.json").read_text())
        return found

    def imported(self, stage: int, world: int, form: Form) -> Checkpoint:
        """As `xtrain checkpoint import` makes it."""
        source = self.folder / f"{stage}x{world}" / ("universal" if form == "ds-universal" else "")
        out = self.folder / f"imported-{stage}x{world}-{form}"
        if out.exists():
            return complete_checkpoints(out / "checkpoints")[0]
        return import_state(source, form, spec_of(stage, world), out).checkpoint

    def gone_on(self, checkpoint: Checkpoint) -> list[float]:
        """The losses after it, on cpu."""
        leg = {"backend": "cpu", "spec": dump_spec(spec_of(0, 1)), "folder": str(checkpoint.path.parent)}
        losses: list[float] = run_leg({**leg, "stop": STEPS}, Job())["losses"]
        return losses


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("stored"))


def difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) == STEPS - MIDDLE
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("stage", "world"), SAVED)
def test_a_checkpoint_of_deepspeeds_own_goes_on_here(jobs: Jobs, stage: int, world: int) -> None:
    checkpoint = jobs.imported(stage, world, "deepspeed")
    checkpoint.check(hashes=True)
    assert checkpoint.step == MIDDLE
    assert difference(jobs.gone_on(checkpoint), jobs.losses[f"{stage}x{world}"]) <= TOLERANCE


@pytest.mark.parametrize("stage", [1, 3])
def test_a_universal_checkpoint_that_deepspeed_made_goes_on_here(jobs: Jobs, stage: int) -> None:
    checkpoint = jobs.imported(stage, 2, "ds-universal")
    assert difference(jobs.gone_on(checkpoint), jobs.losses[f"{stage}x2"]) <= TOLERANCE


@pytest.mark.parametrize("stage", LOADED)
def test_a_universal_checkpoint_that_we_made_goes_on_in_deepspeed(jobs: Jobs, stage: int) -> None:
    """It came from stage 1 on two processes, by way of a checkpoint of ours."""
    assert difference(jobs.losses[f"load-{stage}"], jobs.losses["1x2"]) <= TOLERANCE
