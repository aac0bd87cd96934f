"""The arithmetic of the overhead benchmark; the measurement itself is `make bench`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.measured import Measured
from benchmarks.overhead_report import CaseResult, against_neighbours, evaluate, largest_difference, markdown
from benchmarks.workload import SIZES, Workload
from xtrain.measure.trace import is_traced
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec

LOAD = SIZES["micro"]


def run(step_seconds: float, growth_bytes: int = 100, loss: float = 5.0) -> Measured:
    """A run whose warm-up and traced steps are slow, and all others equal."""
    slow = [step < 5 or is_traced(step, LOAD.steps) for step in range(LOAD.steps)]
    seconds = [9.0 if is_slow else step_seconds for is_slow in slow]
    return Measured(seconds, [loss] * LOAD.steps, sum(seconds), 1000, 1000 + growth_bytes, [])


def case(ours: Measured, precision: str = "fp32") -> CaseResult:
    speed = ([run(0.1), run(0.1)], [ours])
    return evaluate("cpu", precision, "micro", LOAD, speed, ([run(0.1)], [ours]))


@pytest.mark.parametrize("load", SIZES.values(), ids=list(SIZES))
def test_hand_written_schedule_is_the_one_of_xtrain(load: Workload) -> None:
    theirs = learning_rate(Spec.model_validate(load.spec()))
    assert [load.learning_rate(k) for k in range(load.steps)] == [
        pytest.approx(theirs(k), rel=1e-12) for k in range(load.steps)
    ]


def test_linear_drift_of_the_machine_cancels() -> None:
    assert against_neighbours([100.0, 80.0, 60.0], [90.0, 70.0]) == [1.0, 1.0]


def test_equal_loops_give_one_whatever_warm_up_and_traced_steps_took() -> None:
    result = case(run(0.1))
    assert result.speed.median == pytest.approx(1.0)
    assert result.tokens_per_second["plain"] == pytest.approx(LOAD.tokens_per_step / 0.1)
    assert result.verdict == "met"


def test_whole_run_counts_what_single_steps_leave_out() -> None:
    ours = run(0.1)
    result = case(replace(ours, total_seconds=2 * ours.total_seconds))
    assert result.speed.median == pytest.approx(1.0)
    assert result.whole.median == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        (run(0.1 / 0.96), "met"),
        (run(0.1 / 0.94), "missed"),
        (run(0.1, growth_bytes=104), "met"),
        (run(0.1, growth_bytes=106), "missed"),
        (run(0.05, loss=5.001), "not the same training"),
    ],
)
def test_bars_tell_enough_from_too_little(ours: Measured, verdict: str) -> None:
    assert case(ours).verdict == verdict


def test_verdict_says_when_the_machine_is_too_noisy_for_it() -> None:
    speed = ([run(0.1), run(0.12)], [run(0.1)])
    result = evaluate("cpu", "fp32", "micro", LOAD, speed, ([run(0.1)], [run(0.1)]))
    assert result.verdict == "met, noisy"


def test_bf16_may_differ_by_its_own_rounding() -> None:
    assert case(run(0.1, loss=5.001), "bf16").same_training


def test_runs_of_unequal_length_are_no_comparison() -> None:
    with pytest.raises(ValueError):
        largest_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize("found", [[1.0, float("nan"), 1.0], [1.0, 1.0, float("inf")]], ids=str)
def test_a_loss_that_is_no_number_agrees_with_nothing(found: list[float]) -> None:
    assert largest_difference([1.0, 1.0, 1.0], found) == float("inf")
    assert largest_difference(found, [1.0, 1.0, 1.0]) == float("inf")


def test_page_has_a_row_for_each_case() -> None:
    machine = {
        "packages": {"torch": "2", "deepspeed": None},
        "cpu": "c",
        "memory_bytes": 2**30,
        "platform": "p",
    }
    machine |= {"python": "3", "git_commit": "abc"}
    report = {"environment": machine, "date": "d", "command": "x", "rounds": 1, "threads": 1}
    results = [case(run(0.1)), replace(case(run(0.1)), engine="deepspeed:2")]
    page = markdown(report, results)
    assert page.count("\n| cpu |") == 1
    assert page.count("\n| deepspeed:2 |") == 1
