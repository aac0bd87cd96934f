from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

from tests.sample_runs import sample_steps
from xtrain.records.figures import StepFigures
from xtrain.records.metrics import StepRecord, each_step
from xtrain.records.record import Evaluation, LossFacts


def figures(steps: Sequence[StepRecord], start: int = 0) -> StepFigures:
    return StepFigures(steps, start, warmup_steps=0)


def test_losses_and_totals_come_from_the_steps() -> None:
    steps = sample_steps(3)
    skipped = StepRecord(4, float("nan"), 1e-3, None, 500, 0.5, True)
    found = figures([*steps, skipped])
    loss = found.loss()
    assert (loss.first, loss.last, loss.min) == (steps[0].loss, None, steps[2].loss)
    totals = found.totals(seconds=2.0)
    assert (totals.steps, totals.tokens, totals.skipped, totals.seconds) == (4, 3500, 1, 2.0)


def test_a_run_that_took_no_step_has_no_losses() -> None:
    found = figures([])
    assert found.loss() == LossFacts(first=None, last=None, min=None)
    assert found.totals(None).steps == 0
    assert found.evaluation is None


def test_a_run_without_a_finite_loss_has_no_lowest() -> None:
    assert figures([StepRecord(1, None, 1e-3, None, 1, 1.0, True)]).loss().min is None


def test_the_evaluation_knows_its_last_and_its_lowest() -> None:
    losses = [None, 3.0, 2.0, None, 2.5, 2.0, None]
    steps = [StepRecord(i + 1, 1.0, 1e-3, 1.0, 1, 1.0, False, eval_loss=e) for i, e in enumerate(losses)]
    assert figures(steps).evaluation == Evaluation(last=2.0, last_step=6, min=2.0, min_step=3)


def test_speed_is_of_this_process_and_totals_of_the_whole_run() -> None:
    found = figures(sample_steps(20), start=15)
    speed = found.speed.speed()
    assert speed is not None
    assert speed.samples == 5
    assert found.totals(None).tokens == 20_000


def peak_bytes(path: Path, lines: int) -> int:
    """Most that is allocated at once while the figures of that many lines are made."""
    path.write_text(
        "".join(f"{StepRecord(n, 3.0, 1e-4, 1.0, 64, 0.01, False).line()}\n" for n in range(lines))
    )
    tracemalloc.start()
    StepFigures(each_step(path), 0, 3).speed.speed()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_step_takes_a_few_bytes_of_memory_and_not_its_line(tmp_path: Path) -> None:
    """Its rate and no more: a kept record takes hundreds."""
    path = tmp_path / "metrics.jsonl"
    peak_bytes(path, 10)  # imports
    few, many = peak_bytes(path, 1000), peak_bytes(path, 6000)
    assert many - few < 5000 * 16
