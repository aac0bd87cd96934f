from __future__ import annotations

from dataclasses import replace

import pytest

from tests.report.sample_lanes import steps
from xtrain.records.metrics import StepRecord
from xtrain.report.agreement import LARGEST_ALLOWANCE, agreement, allowance


def shaken(taken: list[StepRecord], relative: float) -> list[StepRecord]:
    return [replace(step, loss=(step.loss or 0) * (1 + relative)) for step in taken]


def test_equal_curves_agree() -> None:
    found = agreement(steps(), steps(), "fp32")
    assert (found.loss, found.lr) == (None, None)


def test_a_learning_rate_one_percent_off_shows_at_the_first_step_that_it_can() -> None:
    """The first rate is 0, the second the first that can differ, and shows in the loss of the step after."""
    found = agreement(steps(lr=1.01e-3), steps(), "fp32")
    assert found.lr is not None
    assert found.lr.step == 2
    assert found.lr.value is not None
    assert found.lr.reference
    assert found.lr.value / found.lr.reference == pytest.approx(1.01)
    assert found.loss is not None
    assert found.loss.step == 3


def test_a_rate_that_is_logged_right_but_applied_wrong_is_seen_in_the_loss() -> None:
    planted = [replace(a, lr=b.lr) for a, b in zip(steps(lr=1.01e-3), steps(), strict=True)]
    found = agreement(planted, steps(), "fp32")
    assert found.lr is None
    assert found.loss is not None
    assert found.loss.step == 3


def test_rounding_is_agreement_and_grows_with_the_steps() -> None:
    assert agreement(shaken(steps(), 5e-7), steps(), "fp32").loss is None
    assert allowance(1, "fp32") == allowance(10, "fp32") < allowance(100, "fp32")
    assert allowance(10**9, "fp32") == LARGEST_ALLOWANCE


def test_sixteen_bits_are_held_to_less() -> None:
    apart = shaken(steps(), 1e-3)
    assert agreement(apart, steps(), "fp32").loss is not None
    assert agreement(apart, steps(), "bf16").loss is None
    assert allowance(1, "fp32") < allowance(1, "fp16") < allowance(1, "bf16") == allowance(1, "unheard of")


def test_a_loss_that_is_no_number_in_one_lane_only_is_where_they_part() -> None:
    broken = [replace(step, loss=None) if step.step >= 3 else step for step in steps()]
    departed = agreement(broken, steps(), "fp32").loss
    assert departed is not None
    assert (departed.step, departed.value) == (3, None)
    assert agreement(broken, broken, "fp32").loss is None
