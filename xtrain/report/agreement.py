"""Do two loss curves come from the same training? How far apart they are, and from which step on."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Literal

from xtrain.records.metrics import Natural, StepRecord
from xtrain.records.record import Part

ROUNDING = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 1e-2}
"""By the arithmetic's dtype: what two engines that compute the same may differ by, relative, at the start.
For fp32 it is what the conformance suite holds every lane to; 16-bit ones lose 2^-11 and 2^-8 at a time."""
GROWS_AFTER_STEPS = 10
"""From here on the allowance grows with the steps: training is a chaotic map, and rounding grows in it."""
LARGEST_ALLOWANCE = 0.05
SAME_RATE = 1e-9
"""Learning rates are one formula in double precision."""


class Difference(Part):
    """The largest over all steps, relative to the reference lane."""

    relative: float
    step: Natural


class Departure(Part):
    """The first step at which a lane is elsewhere than the reference."""

    step: Natural
    value: float | None
    """None: no number."""
    reference: float | None
    repeat: Natural = 1
    """Which of the lane's runs went there, 1-based."""


class Agreement(Part):
    """Of a lane with the reference; of the reference's own repeats with its first run."""

    allowed: float
    """Relative, at the start."""
    loss: Departure | None
    """Where the loss leaves what is allowed; None where it never does."""
    lr: Departure | None
    """Where the learning rate is another one."""


def allowance(step: int, dtype: str) -> float:
    """Relative difference of the losses that rounding explains at `step`, 1-based."""
    growth = max(1.0, step / GROWS_AFTER_STEPS)
    start = ROUNDING.get(dtype, max(ROUNDING.values()))
    return min(start * growth, max(start, LARGEST_ALLOWANCE))


def agreement(steps: Sequence[StepRecord], reference: Sequence[StepRecord], dtype: str) -> Agreement:
    """`dtype` is the coarser of the two lanes' arithmetics."""
    pairs = _pairs(steps, reference)
    loss = next(
        (
            Departure(step=a.step, value=a.loss, reference=b.loss)
            for a, b in pairs
            if (a.loss is None) != (b.loss is None)
            or (
                a.loss is not None
                and b.loss is not None
                and relative_difference(a.loss, b.loss) > allowance(a.step, dtype)
            )
        ),
        None,
    )
    rate = next(
        (
            Departure(step=a.step, value=a.lr, reference=b.lr)
            for a, b in pairs
            if relative_difference(a.lr, b.lr) > SAME_RATE
        ),
        None,
    )
    return Agreement(allowed=allowance(1, dtype), loss=loss, lr=rate)


def agreement_of_repeats(
    repeats: Iterable[tuple[int, Sequence[StepRecord]]], reference: Sequence[StepRecord], dtype: str
) -> Agreement:
    """The earliest departures of any of `repeats`, which have their numbers with them."""
    found = [(number, agreement(steps, reference, dtype)) for number, steps in repeats]
    return Agreement(
        allowed=allowance(1, dtype),
        loss=_earliest((number, one.loss) for number, one in found),
        lr=_earliest((number, one.lr) for number, one in found),
    )


def _earliest(departures: Iterable[tuple[int, Departure | None]]) -> Departure | None:
    """The first of equals."""
    found = [one.model_copy(update={"repeat": number}) for number, one in departures if one]
    return min(found, key=lambda one: one.step, default=None)


def widest(differences: Iterable[Difference | None]) -> Difference | None:
    """The first of equals; None where there is none."""
    return max((one for one in differences if one), key=lambda one: one.relative, default=None)


def largest_difference(
    steps: Sequence[StepRecord], reference: Sequence[StepRecord], key: Literal["loss", "grad_norm"]
) -> Difference | None:
    """Over the steps in which both have `key`; None when there is no such step."""
    values = [(a.step, getattr(a, key), getattr(b, key)) for a, b in _pairs(steps, reference)]
    found = [(relative_difference(a, b), -step) for step, a, b in values if a is not None and b is not None]
    if not found:
        return None
    relative, step = max(found)  # the first of equals
    return Difference(relative=relative, step=-step)


def relative_difference(value: float, reference: float) -> float:
    """|value - reference| / |reference|; where that is 0, against the other. Always finite."""
    scale = abs(reference) or abs(value)
    return min(abs(value - reference) / scale, sys.float_info.max) if scale else 0.0


def _pairs(
    steps: Sequence[StepRecord], reference: Sequence[StepRecord]
) -> list[tuple[StepRecord, StepRecord]]:
    expected = {step.step: step for step in reference}
    return [(step, expected[step.step]) for step in steps if step.step in expected]
