"""From measured runs to ratios with their spread, and from those to a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

import numpy as np

from benchmarks.measured import Measured
from benchmarks.page import head
from benchmarks.workload import Workload
from xtrain.measure.trace import is_traced

WARMUP_STEPS = 5
SPEED_BARS = {"micro": 0.95, "small": 0.98}
"""Least share of the hand-written loop's tokens per second."""
MEMORY_BAR = 1.05
"""Most growth of resident memory above the imports, as a multiple of the hand-written loop's."""
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-3}
"""Relative. Beyond it the two did not do the same work, and their speeds say nothing."""

METHOD = f"""\
Two programs train the same model from the same weights on the same batches in the same order, each
run in a fresh process, in turns (A B A B ... A). A run's speed is its tokens per step over the median
seconds of a step, without the first {WARMUP_STEPS} steps and without those that xtrain traces.

- *speed*: each xtrain run over the mean of the hand-written runs before and after it.
- *whole*: the same for all tokens over all seconds from the first step to the last, with warm-up,
  traced steps, and the records written between steps.
- *A/A*: each hand-written run over the one before it: the noise of the machine.
- *memory*: largest resident set minus the resident set after all imports, xtrain over hand-written,
  with MALLOC_MMAP_THRESHOLD_=131072, in separate runs.
- *loss difference*: the largest relative one at any step.

Ratios are medians, with the 10th and 90th percentile in brackets. Where even A/A falls below the bar at
its 10th percentile, the verdict says "noisy": repeat it on a quieter machine.
"""


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, high = np.percentile(values, [10, 90])
        return cls(median(values), float(low), float(high))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


@dataclass(frozen=True)
class CaseResult:
    """One case, ready to be printed. Ratios are xtrain's figure over the hand-written loop's."""

    engine: str
    precision: str
    size: str
    tokens_per_second: dict[str, float]
    speed: Spread
    whole: Spread
    control: Spread
    memory: float
    growth_bytes: dict[str, float]
    loss_difference: float
    step_seconds: dict[str, list[list[float]]]
    """Every step of every run, in the order they were run."""

    @property
    def same_training(self) -> bool:
        return self.loss_difference <= LOSS_TOLERANCE[self.precision]

    @property
    def passed(self) -> bool:
        fast = self.speed.median >= SPEED_BARS[self.size]
        return fast and self.memory <= MEMORY_BAR and self.same_training

    @property
    def verdict(self) -> str:
        if not self.same_training:
            return "not the same training"
        noise = ", noisy" if self.control.low < SPEED_BARS[self.size] else ""
        return f"{'met' if self.passed else 'missed'}{noise}"

    def sentence(self) -> str:
        return (
            f"speed {self.speed}, A/A {self.control}, memory {self.memory:.3f}, "
            f"loss difference {self.loss_difference:.1e}: {self.verdict}"
        )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


Runs = tuple[list[Measured], list[Measured]]
"""The hand-written program's and xtrain's."""


def evaluate(engine: str, precision: str, size: str, load: Workload, speed: Runs, memory: Runs) -> CaseResult:
    """`speed` has one run more of A than of B; `memory` as many of each."""
    baseline, ours = speed
    typical = [[tokens_per_second(run, load) for run in runs] for runs in speed]
    whole = [[load.steps * load.tokens_per_step / run.total_seconds for run in runs] for runs in speed]
    growth = [median([run.growth_bytes for run in runs]) for runs in memory]
    return CaseResult(
        engine=engine,
        precision=precision,
        size=size,
        tokens_per_second={"plain": median(typical[0]), "xtrain": median(typical[1])},
        speed=Spread.of(against_neighbours(*typical)),
        whole=Spread.of(against_neighbours(*whole)),
        control=Spread.of([after / before for before, after in pairs(typical[0])]),
        memory=growth[1] / growth[0],
        growth_bytes={"plain": growth[0], "xtrain": growth[1]},
        loss_difference=max(largest_difference(baseline[0].losses, run.losses) for run in ours),
        step_seconds={
            "plain": [run.step_seconds for run in baseline],
            "xtrain": [run.step_seconds for run in ours],
        },
    )


def tokens_per_second(run: Measured, load: Workload) -> float:
    """Of the median step among those that count: warm, and not traced."""
    counted = [
        seconds
        for step, seconds in enumerate(run.step_seconds)
        if step >= WARMUP_STEPS and not is_traced(step, load.steps)
    ]
    return load.tokens_per_step / median(counted)


def against_neighbours(baseline: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Each of `ours` over the mean of the baseline run before it and the one after it."""
    return [b / mean(around) for b, around in zip(ours, pairs(baseline), strict=True)]


def pairs(values: Sequence[float]) -> list[tuple[float, float]]:
    return list(pairwise(values))


def largest_difference(expected: Sequence[float], found: Sequence[float]) -> float:
    """Relative, over the steps; inf where a loss is no number. ValueError when there are not as many."""
    differences = [abs(f - e) / abs(e) for e, f in zip(expected, found, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def markdown(report: Mapping[str, Any], results: Sequence[CaseResult]) -> str:
    """The page beside the JSON; `report` is what the JSON holds."""
    lines = [
        *head("What xtrain costs", METHOD, report),
        f"- {report['rounds']} xtrain runs per case",
        f"- Bars: speed >= {SPEED_BARS['small']} on small, >= {SPEED_BARS['micro']} on micro; "
        f"memory <= {MEMORY_BAR}",
        "",
        "| engine | precision | size | plain tokens/s | xtrain tokens/s | speed | whole | A/A | memory "
        "| loss difference | bars |",
        "|---|---|---|---:|---:|---|---|---|---:|---:|---|",
        *(row(result) for result in results),
    ]
    return "\n".join(lines) + "\n"


def row(result: CaseResult) -> str:
    speeds = result.tokens_per_second
    cells = [
        result.engine,
        result.precision,
        result.size,
        f"{speeds['plain']:,.0f}",
        f"{speeds['xtrain']:,.0f}",
        str(result.speed),
        str(result.whole),
        str(result.control),
        f"{result.memory:.3f}",
        f"{result.loss_difference:.1e}",
        result.verdict,
    ]
    return f"| {' | '.join(cells)} |"
