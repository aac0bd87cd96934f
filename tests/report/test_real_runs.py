"""Planted differences in runs that really trained: each is called out, and what is alike is called equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.report.sample_lanes import verdict
from tests.small_runs import metrics
from tests.small_runs import run as train
from xtrain.records.metrics import StepRecord
from xtrain.report.agreement import allowance
from xtrain.report.comparison import Comparison
from xtrain.report.merge import merge

LR, PLANTED_LR = 2e-3, 2.02e-3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, trained twice alike and once with another learning rate, without and with a warm-up."""
    folder = tmp_path_factory.mktemp("runs")
    for warmup in (0, 3):
        for name, lr in ((f"plain-{warmup}", LR), (f"again-{warmup}", LR), (f"planted-{warmup}", PLANTED_LR)):
            schedule = f"{{name: cosine, warmup: {warmup}}}"
            words = ("--out", folder / name)
            done = train(folder, *words, backend="cpu", optimizer__lr=lr, schedule=schedule)
            assert done.exit_code == 0, done.output
    return folder


def merged(tmp_path: Path, *runs: Path) -> Comparison:
    return merge([f"{run.name.partition('-')[0]}={run}" for run in runs], tmp_path / "out")


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_learning_rate_one_percent_off_is_called_out_with_the_right_first_step(
    trained: Path, tmp_path: Path, warmup: int
) -> None:
    plain, planted = trained / f"plain-{warmup}", trained / f"planted-{warmup}"
    pairs = list(zip(metrics(plain), metrics(planted), strict=True))
    first_rate = next(a.step for a, b in pairs if a.lr != b.lr)
    first_loss = next(a.step for a, b in pairs if apart(a, b))
    assert (first_rate, first_loss) == ((2, 3) if warmup else (1, 2))  # a warm-up's first rate is 0

    comparison = merged(tmp_path, plain, planted)
    found = verdict(comparison, "losses")
    assert found.headline == "The losses do not agree: planted left plain"
    rate, loss = found.details
    assert rate.startswith(f"planted: its learning rate is another one from step {first_rate}: ")
    assert rate.endswith("(+1.00%)")
    assert loss.startswith(f"planted: its loss leaves plain's at step {first_loss}: ")
    assert any("optimizer.lr 0.00202 instead of 0.002" in warning for warning in comparison.warnings)


def apart(record: StepRecord, other: StepRecord) -> bool:
    """Beyond what fp32's rounding explains."""
    assert record.loss is not None
    assert other.loss is not None
    return abs(record.loss - other.loss) > allowance(record.step, "fp32") * record.loss


def test_two_runs_of_the_same_lane_are_equal(trained: Path, tmp_path: Path) -> None:
    found = verdict(merged(tmp_path, trained / "plain-0", trained / "again-0"), "losses")
    assert (found.headline, found.details) == ("The losses agree", ["again: equal to plain at every step"])
