"""From measured lanes to ratios and bars, and from those to a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.measured import Measured
from benchmarks.overhead_report import (
    WARMUP_STEPS,
    Spread,
    against_neighbours,
    largest_difference,
    pairs,
    tokens_per_second,
)
from benchmarks.page import head
from benchmarks.workload import Workload

SAME_LOSSES = 1e-5

METHOD = f"""\
Everything in fp32 on the CPU, each run in a fresh process, all on the same batches.

**Memory.** A GPT-2 of 6 layers, width 384, vocabulary 8192 (14 million parameters), context 512, batch 8
in one pass, AdamW, 2 updates. *Peak* is the largest resident set of the process, *grown by* the same without
what was resident when everything had been imported, both with MALLOC_MMAP_THRESHOLD_=131072: medians of the
runs, in brackets the least and the most. The Hugging Face lane is its GPT2LMHeadModel in a plain loop with
its own loss; the others are `xtrain run --backend cpu`.

**Time.** The same model with context 256 and batch 4. Runs without (A) and with (B) the technique take
turns, A B A B ... A. A run's time is its median step, without the first {WARMUP_STEPS} and without those
that xtrain traces; *time* is each B over the mean of the A before and after it, *A/A* each A over the A
before it: the noise. Medians, with the 10th and 90th percentile in brackets. The loss difference is the
largest relative one at any step.
"""


@dataclass(frozen=True)
class MemoryResult:
    """A lane's runs: the largest resident set of each, and what was resident after all imports."""

    lane: str
    peaks_bytes: list[int]
    imports_bytes: list[int]
    losses: list[float]

    @property
    def peak_bytes(self) -> float:
        return median(self.peaks_bytes)

    @property
    def growths_bytes(self) -> list[int]:
        return [peak - imports for peak, imports in zip(self.peaks_bytes, self.imports_bytes, strict=True)]

    @property
    def growth_bytes(self) -> float:
        return median(self.growths_bytes)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_memory(lane: str, runs: Sequence[Measured]) -> MemoryResult:
    peaks = [run.peak_bytes for run in runs]
    return MemoryResult(lane, peaks, [run.imports_bytes for run in runs], runs[0].losses)


@dataclass(frozen=True)
class SpeedResult:
    """Seconds of a step with a technique, as a multiple of those without it."""

    technique: str
    bar: float | None
    ratio: Spread
    control: Spread
    loss_difference: float
    step_seconds: dict[str, list[list[float]]]
    """Every step of every run, in the order they were run."""

    @property
    def verdict(self) -> str:
        if self.loss_difference > SAME_LOSSES:
            return "not the same training"
        if self.bar is None:
            return ""
        noise = ", noisy" if self.control.high > self.bar else ""
        return f"{'met' if self.ratio.median <= self.bar else 'missed'}{noise}"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def evaluate_speed(
    technique: str, bar: float | None, load: Workload, without: Sequence[Measured], using: Sequence[Measured]
) -> SpeedResult:
    """`without` has one run more than `using`."""
    seconds = [
        [load.tokens_per_step / tokens_per_second(run, load) for run in runs] for runs in (without, using)
    ]
    return SpeedResult(
        technique,
        bar,
        ratio=Spread.of(against_neighbours(*seconds)),
        control=Spread.of([after / before for before, after in pairs(seconds[0])]),
        loss_difference=max(largest_difference(without[0].losses, run.losses) for run in using),
        step_seconds={
            "without": [run.step_seconds for run in without],
            "with": [run.step_seconds for run in using],
        },
    )


def markdown(
    report: Mapping[str, Any],
    memory: Sequence[MemoryResult],
    speed: Sequence[SpeedResult],
    judged: str,
    bars: Mapping[str, float],
) -> str:
    """The page; `bars` says how much of other lanes the lane `judged` may take."""
    lines = head("What memory techniques save and cost", METHOD, report)
    if memory:
        lines += ["", *memory_table(memory), "", *memory_bars(memory, judged, bars)]
    if speed:
        lines += ["", f"{report['rounds']} runs with each technique:", "", *speed_table(speed)]
    return "\n".join(lines) + "\n"


def memory_table(memory: Sequence[MemoryResult]) -> list[str]:
    first = memory[0]
    rows = [
        f"| {one.lane} | {mebibytes(one.peak_bytes)} | {mebibytes(one.growth_bytes)} "
        f"({mebibytes(min(one.growths_bytes))}-{mebibytes(max(one.growths_bytes))}) "
        f"| {one.peak_bytes / first.peak_bytes:.2f} | {one.growth_bytes / first.growth_bytes:.2f} |"
        for one in memory
    ]
    head = "| lane | peak, MiB | grown by, MiB | peak, of the first | grown by, of the first |"
    return [head, "|---|---:|---:|---:|---:|", *rows]


def memory_bars(memory: Sequence[MemoryResult], judged: str, bars: Mapping[str, float]) -> list[str]:
    """Both counts are held against the bar."""
    found = {one.lane: one for one in memory}
    lines = []
    for other, bar in bars.items():
        if judged in found and other in found:
            ours, theirs = found[judged], found[other]
            peak = ours.peak_bytes / theirs.peak_bytes
            growth = ours.growth_bytes / theirs.growth_bytes
            verdict = "met" if max(peak, growth) <= bar else "missed"
            lines.append(
                f"- {judged}: {peak:.3f} of the peak and {growth:.3f} of the growth of {other}, "
                f"bar {bar}: {verdict}"
            )
    return lines


def speed_table(speed: Sequence[SpeedResult]) -> list[str]:
    rows = [
        f"| {one.technique} | {typical(one.step_seconds['without']):.3f} | {one.ratio} | {one.control} "
        f"| {one.loss_difference:.1e} | {one.bar or '-'} | {one.verdict or '-'} |"
        for one in speed
    ]
    head = "| technique | seconds without | time | A/A | loss difference | bar | verdict |"
    return [head, "|---|---:|---|---|---:|---:|---|", *rows]


def typical(runs: Sequence[Sequence[float]]) -> float:
    return median(median(seconds) for seconds in runs)


def mebibytes(count: float) -> str:
    return f"{count / 2**20:,.0f}"
