"""From step records to speed: pure functions, so that the same records give the same figures."""

from __future__ import annotations

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


def measure_speed(records: Sequence[StepRecord], warmup_steps: int) -> Speed | None:
    """Speed over the records of one process, in order; None when no step is left to count.

    The first `warmup_steps`, the traced and the untimed ones do not count.
    """
    settled = records[warmup_steps:]
    rates = sorted(r.tokens / r.seconds for r in settled if r.seconds and r.spans is None)
    if not rates:
        return None
    return Speed(
        tokens_per_second=median(rates),
        p10=_quantile(rates, 0.1),
        p90=_quantile(rates, 0.9),
        samples=len(rates),
        warmup_steps_left_out=len(records) - len(settled),
        traced_steps_left_out=sum(r.spans is not None for r in settled),
    )


def split_time(records: Sequence[StepRecord]) -> TimeSplit | None:
    """Means over the traced steps, which must be timed from getting the batch to the end of the update.

    None when no step was traced. A phase that the engine marks no span of is left out, for it was not
    measured; what is in no span is `other`.
    """
    traced = [(r.spans, r.seconds) for r in records if r.spans is not None and r.seconds]
    if not traced:
        return None
    marked = [phase for phase in PHASES if phase == "other" or any(phase in spans for spans, _ in traced)]
    sums = {phase: sum(spans.get(phase, 0.0) for spans, _ in traced) for phase in marked}
    total = max(
        sum(seconds for _, seconds in traced), sum(sums.values())
    )  # clocks are read one after another
    sums["other"] += total - sum(sums.values())
    return TimeSplit(
        seconds={phase: seconds / len(traced) for phase, seconds in sums.items()},
        shares={phase: seconds / total for phase, seconds in sums.items()},
        traced_steps=len(traced),
    )


def imbalance(rank_seconds: Sequence[Mapping[str, float]]) -> float | None:
    """How much longer than the mean the slowest rank's own work takes, relative; None with one rank.

    The forward pass alone: in the others a rank may wait for the rest.
    """
    own = [seconds["forward"] for seconds in rank_seconds if 0 < seconds.get("forward", 0.0) < 1e12]
    if len(own) < 2 or len(own) < len(rank_seconds):
        return None
    return max(own) / fmean(own) - 1


def _quantile(ascending: Sequence[float], share: float) -> float:
    """Linear between the two nearest."""
    place = share * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])
