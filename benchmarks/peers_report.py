"""From the peers' runs to a table with spreads, and from that to bars met or missed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean, median
from typing import Any

from benchmarks.measured import Measured
from benchmarks.overhead_report import (
    LOSS_TOLERANCE,
    WARMUP_STEPS,
    Spread,
    largest_difference,
    tokens_per_second,
)
from benchmarks.page import head
from benchmarks.workload import Workload

LaneRuns = list[tuple[str, Measured]]
"""(lane, run) in the order they were made."""

METHOD = f"""\
Every lane trains the same GPT-2 from the same weights on the same sequences in the same order: fused AdamW,
warm-up and cosine, clipping by the global norm, accumulation over two micro-batches. Each run is a fresh
process; they take turns, with the plain loop between every two lanes.

- *tokens/s*: of the median step, without the first {WARMUP_STEPS} and without those that xtrain traces.
- *of plain*: each run over the mean of the plain runs before and after it; medians, with the 10th and 90th
  percentile in brackets. The plain loop's own row is A/A: each of its runs over the one before it.
- *CPU s/step*: CPU time of all threads, the mean over all steps but the first.
- *start-up*: from starting the process to the end of its first step, with all imports.
- *peak RSS*: the largest resident set of the process. *grown by*: the same above what all imports take, in
  runs of their own with everything imported beforehand and MALLOC_MMAP_THRESHOLD_=131072.
- *loss difference*: the largest relative one at any step, against the plain loop with the same model.
"""
TRAINER_LANES = ("HF Trainer", "Lightning Trainer", "DeepSpeed ZeRO-2")
FRAMEWORK_LANES = ("Accelerate", "Lightning Fabric", "DeepSpeed", *TRAINER_LANES)
BUILT_IN_PLAIN = "plain loop, built-in model"
BUILT_IN_BAR = 1.10
DEEPSPEED_BAR = 0.99
STARTUP_BAR_SECONDS = 0.5


@dataclass(frozen=True)
class LaneResult:
    """One lane's figures; None where they were not measured."""

    lane: str
    tokens_per_second: float
    of_plain: Spread | None
    """For the plain loop itself A/A; None where it ran only once."""
    cpu_step_seconds: float
    startup_seconds: float
    peak_bytes: float
    loss_difference: float
    step_seconds: list[list[float]]


@dataclass(frozen=True)
class Case:
    """One size in one precision."""

    size: str
    precision: str
    vocab_size: int
    steps: int
    plain: str
    lanes: list[LaneResult]
    grown_bytes: Mapping[str, int]

    @classmethod
    def of(
        cls, size: str, load: Workload, plain: str, runs: LaneRuns, grown_bytes: Mapping[str, int]
    ) -> Case:
        names = list(dict.fromkeys(name for name, _ in runs))
        lanes = [_lane(name, load, plain, runs) for name in names]
        return cls(size, load.precision, load.vocab_size, load.steps, plain, lanes, grown_bytes)

    @property
    def same_training(self) -> bool:
        return all(lane.loss_difference <= LOSS_TOLERANCE[self.precision] for lane in self.lanes)

    def verdicts(self) -> Iterator[str]:
        """What is asked of xtrain, as far as these lanes can tell."""
        rate = {lane.lane: lane.tokens_per_second for lane in self.lanes}
        ratio = {lane.lane: lane.of_plain.median for lane in self.lanes if lane.of_plain}
        startup = {lane.lane: lane.startup_seconds for lane in self.lanes}
        ahead_of = TRAINER_LANES if self.size == "micro" else FRAMEWORK_LANES
        if (ours := ratio.get("xtrain cpu")) is not None:
            noise = next(lane.of_plain for lane in self.lanes if lane.lane == self.plain)
            floor = min(1.0, noise.low) if noise else 1.0
            yield _verdict(f"xtrain cpu at {ours:.3f} of the plain loop, A/A {noise}", ours >= floor)
            for other in ahead_of:
                if other in ratio:
                    yield _verdict(f"xtrain cpu ahead of {other} ({ratio[other]:.3f})", ours >= ratio[other])
            later = startup["xtrain cpu"] - startup[self.plain]
            said = f"xtrain cpu starts {later:+.2f} s after the plain loop, at most {STARTUP_BAR_SECONDS}"
            yield _verdict(said, later <= STARTUP_BAR_SECONDS)
        if (built_in := ratio.get("xtrain cpu, built-in model")) is not None:
            said = f"built-in model at {built_in:.3f} of the plain loop with HF's, at least {BUILT_IN_BAR}"
            yield _verdict(said, built_in >= BUILT_IN_BAR)
        if "xtrain deepspeed" in rate and "DeepSpeed" in rate:
            share = ratio["xtrain deepspeed"] / ratio["DeepSpeed"]
            said = f"xtrain deepspeed at {share:.3f} of the raw DeepSpeed script, at least {DEEPSPEED_BAR}"
            yield _verdict(said, share >= DEEPSPEED_BAR)
        if self.plain in self.grown_bytes and "xtrain cpu" in self.grown_bytes:
            share = self.grown_bytes["xtrain cpu"] / self.grown_bytes[self.plain]
            bar = 0.60 if self.vocab_size > 10_000 else 1.0
            yield _verdict(
                f"xtrain cpu grows by {share:.2f} of the plain loop, at most {bar:.2f}", share <= bar
            )
        if self.lanes:
            yield _verdict("all losses agree", self.same_training)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdicts": list(self.verdicts())}


def _lane(name: str, load: Workload, plain: str, runs: LaneRuns) -> LaneResult:
    own = [run for lane, run in runs if lane == name]
    reference_name = BUILT_IN_PLAIN if "built-in" in name else plain
    reference = next((run for lane, run in runs if lane == reference_name), own[0])
    ratios = against_plain(name, load, plain, runs)
    return LaneResult(
        name,
        median(tokens_per_second(run, load) for run in own),
        Spread.of(ratios) if ratios else None,
        median(run.cpu_step_seconds or 0.0 for run in own),
        median(run.startup_seconds or 0.0 for run in own),
        median(run.peak_bytes for run in own),
        max(largest_difference(reference.losses, run.losses) for run in own),
        [run.step_seconds for run in own],
    )


def against_plain(name: str, load: Workload, plain: str, runs: LaneRuns) -> list[float]:
    """Speeds over the mean of the plain runs around them; of the plain loop, over the plain run before."""
    speeds = [(lane, tokens_per_second(run, load)) for lane, run in runs]
    if name == plain:
        return [after / before for before, after in pairwise(s for lane, s in speeds if lane == plain)]
    ratios = []
    for place, (lane, speed) in enumerate(speeds):
        if lane == name:
            before = next(s for other, s in reversed(speeds[:place]) if other == plain)
            after = next(s for other, s in speeds[place:] if other == plain)
            ratios.append(speed / mean((before, after)))
    return ratios


def markdown(report: Mapping[str, Any], cases: Sequence[Case]) -> str:
    lines = head("xtrain beside its peers", METHOD, report)
    for case in cases:
        lines += ["", *_section(case)]
    return "\n".join(lines) + "\n"


def _section(case: Case) -> Iterator[str]:
    yield f"## {case.size}, {case.precision}, vocabulary {case.vocab_size:,}"
    yield ""
    if case.lanes:
        yield "| lane | tokens/s | of plain | CPU s/step | start-up s | peak RSS MiB | loss difference |"
        yield "|---|---:|---|---:|---:|---:|---:|"
        yield from map(_row, case.lanes)
        yield ""
    if case.grown_bytes:
        plain = case.grown_bytes[case.plain]
        yield "| lane | grown by, MiB | of plain |"
        yield "|---|---:|---:|"
        for name, grown in case.grown_bytes.items():
            yield f"| {name} | {grown / 2**20:,.0f} | {grown / plain:.2f} |"
        yield ""
    for verdict in case.verdicts():
        yield f"- {verdict}"


def _row(lane: LaneResult) -> str:
    return (
        f"| {lane.lane} | {lane.tokens_per_second:,.0f} | {lane.of_plain or '-'} "
        f"| {lane.cpu_step_seconds:.3f} | {lane.startup_seconds:.1f} "
        f"| {lane.peak_bytes / 2**20:,.0f} | {lane.loss_difference:.1e} |"
    )


def _verdict(said: str, met: bool) -> str:
    return f"{said}: {'met' if met else 'missed'}"
