"""Which of two speeds is higher, and is the difference more than noise?

Steps of one process are alike in ways that another process would not repeat, so what counts as one
measurement is one run, by its median. Between two lanes the noise is half the width of the 95% confidence
interval of the difference of their mean logarithms (Student's t with the pooled variance). Of several lanes
every pair might differ by chance: 5% is the risk that any of them seems to, so each has its part of it
(Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, fmean, variance

RISK = 0.05
"""That a comparison of equal lanes calls any of them faster."""
SINGLE_RUN_NOISE = 0.05
"""Of one run per lane nobody knows what the next would give; differences below this are not believed."""
SMALLEST_NOISE = 0.01
"""Smaller differences are not worth a word, however alike the repeats are."""


@dataclass(frozen=True)
class SpeedDifference:
    """Of one lane against another."""

    ratio: float
    """Speed / the other's speed; means of logarithms."""
    noise: float
    """Relative; a difference below it says nothing."""

    @property
    def noise_below(self) -> float:
        """The same noise for a slower lane: 100% more is 50% less."""
        return self.noise / (1 + self.noise)

    @property
    def is_noise(self) -> bool:
        return abs(math.log(self.ratio)) <= math.log1p(self.noise)


def compare_speeds(
    rates: Sequence[float], others: Sequence[float], unrest: float = 0.0, lanes: int = 2
) -> SpeedDifference:
    """From each run's speed, positive; at least one of each.

    `unrest` is the relative standard error that the steps inside the runs suggest. It alone is known where
    both lanes ran once. `lanes` is from how many the two are; they may have been picked for being far apart.
    """
    risk = RISK / math.comb(lanes, 2)
    logs, other_logs = [math.log(r) for r in rates], [math.log(r) for r in others]
    ratio = math.exp(fmean(logs) - fmean(other_logs))
    degrees = len(logs) + len(other_logs) - 2
    if degrees == 0:
        return SpeedDifference(
            ratio, max(SINGLE_RUN_NOISE, math.expm1(NormalDist().inv_cdf(1 - risk / 2) * unrest))
        )
    pooled = (_squares(logs) + _squares(other_logs)) / degrees
    error = math.sqrt(pooled * (1 / len(logs) + 1 / len(other_logs)))
    bound = student_quantile(risk, degrees) * error
    return SpeedDifference(ratio, max(SMALLEST_NOISE, math.expm1(min(bound, 50.0))))


@cache
def student_quantile(risk: float, degrees: int) -> float:
    """What Student's t of `degrees` >= 1 exceeds, up or down, with probability `risk`: by halving angles."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 1 - risk else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """Probability of |t| <= sqrt(degrees) tan(angle) (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def median_error(p10: float, median: float, p90: float, samples: int) -> float:
    """Relative standard error of a median of `samples` values, from their 10th and 90th percentile.

    As if they were normal and independent: sigma is (p90 - p10) / 2.563, and the median's error
    1.253 sigma / sqrt(samples).
    """
    return 1.253 * (p90 - p10) / 2.563 / math.sqrt(samples) / median if samples and median else 0.0


def _squares(values: Sequence[float]) -> float:
    """Sum of squared deviations."""
    return variance(values) * (len(values) - 1) if len(values) > 1 else 0.0
