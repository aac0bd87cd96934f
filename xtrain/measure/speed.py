"""From step records to speed: the same records give the same figures."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from pydantic import ConfigDict

from xtrain.records.metrics import StepRecord

PHASES = ("data", "forward", "backward", "reduce", "optimizer", "other")
"""How a step's time is split: `data` gets the batch, `reduce` communicates, `other` is in no span."""
PHASE_NAMES = {"reduce": "communication"}
"""What people read, where it is not the phase's own name."""
FINITE = ConfigDict(strict=True, allow_inf_nan=False)
"""Records are read back, and not trusted."""


@dataclass(frozen=True)
class Speed:
    """Targets per second of the whole job, over the steps that count."""

    __pydantic_config__ = FINITE

    tokens_per_second: float
    """Median."""
    p10: float
    p90: float
    """The slow and the fast end: a tenth of the steps lies below p10, a tenth above p90."""
    samples: int
    warmup_steps_left_out: int
    traced_steps_left_out: int


@dataclass(frozen=True)
class TimeSplit:
    """Where the time of the traced steps went, by PHASES."""

    __pydantic_config__ = FINITE

    seconds: dict[str, float]
    """Mean of a step."""
    shares: dict[str, float]
    """Of the step's whole time; they add up to 1."""
    traced_steps: int


class SpeedMeter:
    """Speed over the steps of one process, told in order.

    The first `warmup_steps`, the traced and the untimed ones do not count. Of each that does eight bytes are
    kept, its rate: percentiles need them all.
    """

    def __init__(self, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self._rates = array("d")
        self._steps = self._traced = 0

    def add(self, record: StepRecord) -> None:
        self._steps += 1
        if self._steps <= self._warmup_steps:
            return
        if record.spans is not None:
            self._traced += 1
        elif record.seconds:
            self._rates.append(record.tokens / record.seconds)

    def speed(self) -> Speed | None:
        """None when no step is left to count."""
        if not self._rates:
            return None
        rates = _ascending(self._rates)
        middle = rates[(len(rates) - 1) // 2 : len(rates) // 2 + 1]
        return Speed(
            tokens_per_second=median(middle),
            p10=_quantile(rates, 0.1),
            p90=_quantile(rates, 0.9),
            samples=len(rates),
            warmup_steps_left_out=min(self._steps, self._warmup_steps),
            traced_steps_left_out=self._traced,
        )


class SplitMeter:
    """Means over the traced steps, which must be timed from getting the batch to the end of the update.

    A phase that the engine marks no span of is left out, for it was not measured; what is in no span is
    `other`.
    """

    def __init__(self) -> None:
        self._spans: dict[str, float] = {}
        self._seconds = 0.0
        self._traced = 0

    def add(self, record: StepRecord) -> None:
        if record.spans is None or not record.seconds:
            return
        self._traced += 1
        self._seconds += record.seconds
        for phase, seconds in record.spans.items():
            self._spans[phase] = self._spans.get(phase, 0.0) + seconds

    def split(self) -> TimeSplit | None:
        """None when no step was traced."""
        if not self._traced:
            return None
        sums = {p: self._spans.get(p, 0.0) for p in PHASES if p == "other" or p in self._spans}
        total = max(self._seconds, sum(sums.values()))  # clocks are read one after another
        sums["other"] += total - sum(sums.values())
        return TimeSplit(
            seconds={phase: seconds / self._traced for phase, seconds in sums.items()},
            shares={phase: seconds / total for phase, seconds in sums.items()},
            traced_steps=self._traced,
        )


def imbalance(rank_seconds: Sequence[Mapping[str, float]]) -> float | None:
    """How much longer than the mean the slowest rank's own work takes, relative; None with one rank.

    The forward pass alone: in the others a rank may wait for the rest.
    """
    own = [seconds["forward"] for seconds in rank_seconds if 0 < seconds.get("forward", 0.0) < 1e12]
    if len(own) < 2 or len(own) < len(rank_seconds):
        return None
    return max(own) / fmean(own) - 1


def _ascending(values: array[float]) -> array[float]:
    """Sorted where they lie: sorted() would make an object of each."""
    import numpy as np  # here, for this module is read where nothing is trained

    np.frombuffer(values).sort()
    return values


def _quantile(ascending: Sequence[float], share: float) -> float:
    """Linear between the two nearest."""
    place = share * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])
