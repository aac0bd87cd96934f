"""Planted differences in runs that really trained: each is called out, and what is alike is called equal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.sample_lanes import compared, lane, run, slowed, steps, verdict
from tests.small_runs import metrics
from tests.small_runs import run as train
from xtrain.records.metrics import StepRecord
from xtrain.report.agreement import allowance
from xtrain.report.comparison import Comparison
from xtrain.report.merge import merge
from xtrain.report.runs import Run

LR, PLANTED_LR = 2e-3, 2.02e-3
MEASURED: list[list[float]] = json.loads(Path(__file__).with_name("measured_seconds.json").read_text())[
    "repeats"
]
"""Seconds of steps as a run measured them; how, the file says."""


RUNS = {
    "plain-0": (LR, 0),
    "again-0": (LR, 0),
    "planted-0": (PLANTED_LR, 0),
    "plain-3": (LR, 3),
    "planted-3": (PLANTED_LR, 3),
}
"""Learning rate, and updates of warm-up."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2, trained in each of these ways."""
    folder = tmp_path_factory.mktemp("runs")
    for name, (lr, warmup) in RUNS.items():
        schedule = f"{{name: cosine, warmup: {warmup}}}"
        sets = {"optimizer__lr": str(lr), "schedule": schedule, "checkpoint__every_steps": "null"}
        done = train(folder, "--out", folder / name, backend="cpu", **sets)
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


# --- speed: what was measured, and a tenth planted in it ------------------------------------------


def measured(seconds: list[float]) -> Run:
    """Its steps took these."""
    return run([replace(one, seconds=s) for one, s in zip(steps(len(seconds)), seconds, strict=True)])


def test_the_same_lane_twice_is_within_noise() -> None:
    """Three of the repeats against the three in between."""
    both = compared(lane("a", *map(measured, MEASURED[::2])), lane("b", *map(measured, MEASURED[1::2])))
    found = verdict(both, "speed")
    assert found.headline.startswith("No lane is faster beyond noise (")
    assert " apart, within noise (" in found.details[0]


@pytest.mark.parametrize("slow", ["a", "b"])
def test_a_lane_slowed_by_a_tenth_is_called_slower(slow: str) -> None:
    runs = {"a": [*map(measured, MEASURED[::2])], "b": [*map(measured, MEASURED[1::2])]}
    runs[slow] = [run(slowed(one.steps, 1.1)) for one in runs[slow]]
    fast = "b" if slow == "a" else "a"
    found = verdict(compared(*(lane(name, *taken) for name, taken in runs.items())), "speed")
    assert found.headline.startswith(f"{fast} is the fastest: ")
    assert f"{slow} is " in found.details[0]
    assert f"% slower than {fast} (noise " in found.details[0]
