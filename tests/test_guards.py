from __future__ import annotations

import json
import math

import pytest

from xtrain.contract import StepValues
from xtrain.errors import RunFailed
from xtrain.guards import FLOOR_OVERFLOWS, DivergenceWatch, Guards, OverflowWatch
from xtrain.spec.tree import Precision, Stability


def test_a_spike_has_no_verdict_before_the_window_is_full() -> None:
    guards = Guards(Stability(loss_spike=2.0, window=3))
    assert [guards.accept(loss, None) for loss in (1.0, 1.0, 50.0)] == [True, True, True]
    assert guards.accept(34.0, None)  # below 2 x the mean of 1, 1, 50
    assert not guards.accept(60.0, None)  # above 2 x the mean of 1, 50, 34


def test_a_spike_is_held_against_the_mean_of_the_last_unskipped_losses() -> None:
    guards = Guards(Stability(loss_spike=2.0, window=3))
    for loss in (9.0, 1.0, 2.0, 3.0):  # 9 has left the window
        assert guards.accept(loss, None)
    assert not guards.accept(4.01, None)
    assert not guards.accept(4.01, None)  # the skipped one did not raise the mean
    assert guards.accept(4.0, None)  # equal is not above
    assert not guards.accept(6.01, None)  # 2, 3, 4 now


def test_the_gradient_norm_may_equal_its_limit() -> None:
    guards = Guards(Stability(grad_norm=1.5))
    assert guards.accept(1.0, 1.5)
    assert not guards.accept(1.0, 1.5001)
    assert guards.accept(1.0, None)  # unknown: no verdict


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_skipped_whatever_the_limits(bad: float) -> None:
    guards = Guards(Stability())
    assert not guards.accept(bad, 1.0)
    assert not guards.accept(1.0, bad)
    assert guards.accept(1.0, 1.0)


def test_only_skips_in_a_row_end_a_run_and_the_last_reason_is_told() -> None:
    guards = Guards(Stability(grad_norm=2.0, stop_after=2))
    for norm in (3.0, 1.0, 3.0):
        guards.accept(1.0, norm)
        guards.check()
    guards.accept(1.0, 4.0)
    with pytest.raises(RunFailed) as caught:
        guards.check()
    assert str(caught.value) == (
        "2 steps in a row were skipped (stability.stop_after is 2); the last because the gradient norm 4 is "
        "above stability.grad_norm 2. Lower optimizer.lr or lengthen schedule.warmup, and go on from a "
        "checkpoint before it began"
    )


def test_without_stop_after_skips_never_end_a_run() -> None:
    guards = Guards(Stability())
    for _ in range(100):
        guards.accept(math.nan, None)
        guards.check()


def test_guards_that_were_restored_decide_as_the_ones_they_come_from() -> None:
    section = Stability(loss_spike=1.5, window=4, stop_after=3)
    losses = [1.0, 1.1, 0.9, 1.0, 9.0, 9.0, 1.2, 1.6, 1.7, 9.0, 9.0, 1.0]
    whole = Guards(section)
    expected = [whole.accept(loss, None) for loss in losses]
    assert False in expected[6:]
    for cut in range(len(losses)):
        before, after = Guards(section), Guards(section)
        found = [before.accept(loss, None) for loss in losses[:cut]]
        after.restore(json.loads(json.dumps(before.state())))
        found += [after.accept(loss, None) for loss in losses[cut:]]
        assert found == expected
        assert after.skips_in_a_row == whole.skips_in_a_row


def test_a_longer_or_shorter_window_takes_over_what_fits() -> None:
    long = Guards(Stability(loss_spike=2.0, window=4))
    for loss in (8.0, 8.0, 1.0, 1.0):
        long.accept(loss, None)
    short = Guards(Stability(loss_spike=2.0, window=2))
    short.restore(long.state())
    assert not short.accept(2.1, None)


def values(step: int, skipped: bool, norm: float, scale: float | None) -> StepValues:
    return StepValues(step, 1.0, norm, skipped, scale)


@pytest.mark.parametrize(
    "precision",
    [
        Precision.model_validate({"dtype": "fp16", "min_loss_scale": 4.0}),
        Precision.model_validate({"dtype": "fp16", "loss_scale": 4.0}),
    ],
    ids=["dynamic", "static"],
)
def test_overflows_in_a_row_at_the_floor_end_the_run_with_a_diagnosis(precision: Precision) -> None:
    watch = OverflowWatch(precision)
    for step in range(FLOOR_OVERFLOWS - 1):
        watch.check(values(step, True, math.inf, 4.0))
    with pytest.raises(RunFailed) as caught:
        watch.check(values(9, True, math.nan, 4.0))
    assert str(caught.value) == (
        "fp16 gradients overflowed in 5 steps in a row although the loss scale is at its floor (4): the "
        "training diverges, or the model needs more range than fp16 has. Use precision: bf16, or lower "
        "optimizer.lr"
    )


@pytest.mark.parametrize(
    "between",
    [values(0, False, 1.0, 4.0), values(0, True, math.inf, 8.0), values(0, True, 50.0, 4.0)],
    ids=["good step", "overflow above the floor", "skipped by a guard"],
)
def test_other_steps_break_the_row_of_overflows(between: StepValues) -> None:
    watch = OverflowWatch(Precision.model_validate({"dtype": "fp16", "min_loss_scale": 4.0}))
    for step in range(3 * FLOOR_OVERFLOWS):
        bad = values(step, True, math.inf, 4.0)
        watch.check(between if step % FLOOR_OVERFLOWS == FLOOR_OVERFLOWS - 1 else bad)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_a_run_without_guards(bad: float) -> None:
    DivergenceWatch().check(values(9, False, 1.0, None))
    with pytest.raises(RunFailed, match="the loss of step 8 is"):
        DivergenceWatch().check(StepValues(7, bad, 1.0, False, None))
