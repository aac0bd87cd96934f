"""From the peers' runs to a table with spreads, and from that to bars met or missed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
- *plain loop, tuned* has Hugging Face's GELU in one kernel and an allocator that keeps freed memory. xtrain
  does both by itself; no other lane has them.
- A verdict on speed is *noisy* where it misses its bar by no more than A/A's 10th percentile misses 1.
- *loss difference*: the largest relative one at any step, against the plain loop with the same model.
"""
TRAINER_LANES = ("HF Trainer", "Lightning Trainer", "Lightning Fabric", "DeepSpeed ZeRO-2")
FRAMEWORK_LANES = ("Accelerate", "DeepSpeed", *TRAINER_LANES)
BUILT_IN_PLAIN = "plain loop, built-in model"
BUILT_IN_BAR = 1.10
DEEPSPEED_BAR = 0.99
STARTUP_BAR_SECONDS = 0.5
MISSED = "missed"


@dataclass(frozen=True)
class LaneResult:
    """One lane's figures; None where they were not measured."""

    lane: str
    tokens_per_second: float
    of_plain: Spread | None
    """For the plain loop itself A/A; None where it ran only once."""
    cpu_step_seconds: float | None
    startup_seconds: float | None
    peak_bytes: float
    loss_difference: float | None
    """None without a plain loop that trains the same model."""
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
        differences = [one.loss_difference for one in self.lanes if one.loss_difference is not None]
        return all(one <= LOSS_TOLERANCE[self.precision] for one in differences)

    @property
    def missed(self) -> list[str]:
        return [verdict for verdict in self.verdicts() if verdict.endswith(MISSED)]

    def verdicts(self) -> Iterator[str]:
        """What is asked of xtrain, as far as these lanes can tell."""
        yield from self._speeds()
        yield from self._start_up()
        yield from self._memory()
        if self.lanes:
            yield _verdict("all losses agree", self.same_training)

    def _speeds(self) -> Iterator[str]:
        ratio = {lane.lane: lane.of_plain.median for lane in self.lanes if lane.of_plain}
        noise = next((lane.of_plain for lane in self.lanes if lane.lane == self.plain), None)
        low = noise.low if noise else 1.0
        if (ours := ratio.get("xtrain cpu")) is not None:
            yield _speed(f"xtrain cpu at {ours:.3f} of the plain loop, A/A {noise or '-'}", ours, 1.0, low)
            for other in TRAINER_LANES if self.size == "micro" else FRAMEWORK_LANES:
                if other in ratio:
                    said = f"xtrain cpu ahead of {other} ({ratio[other]:.3f})"
                    yield _speed(said, ours, ratio[other], low)
        if (built_in := ratio.get("xtrain cpu, built-in model")) is not None:
            said = f"built-in model at {built_in:.3f} of the plain loop with HF's, at least {BUILT_IN_BAR}"
            yield _speed(said, built_in, BUILT_IN_BAR, low)
        if "xtrain deepspeed" in ratio and "DeepSpeed" in ratio:
            share = ratio["xtrain deepspeed"] / ratio["DeepSpeed"]
            said = f"xtrain deepspeed at {share:.3f} of the raw DeepSpeed script, at least {DEEPSPEED_BAR}"
            yield _speed(said, share, DEEPSPEED_BAR, low)

    def _start_up(self) -> Iterator[str]:
        seconds = {lane.lane: lane.startup_seconds for lane in self.lanes}
        ours, plain = seconds.get("xtrain cpu"), seconds.get(self.plain)
        if ours is not None and plain is not None:
            said = (
                f"xtrain cpu starts {ours - plain:+.2f} s after the plain loop, at most {STARTUP_BAR_SECONDS}"
            )
            yield _verdict(said, ours - plain <= STARTUP_BAR_SECONDS)

    def _memory(self) -> Iterator[str]:
        peaks = {lane.lane: lane.peak_bytes for lane in self.lanes if "built-in" not in lane.lane}
        if "xtrain cpu" in peaks and len(peaks) > 1:
            others = min(peak for lane, peak in peaks.items() if not lane.startswith("xtrain"))
            share = peaks["xtrain cpu"] / others
            yield _verdict(f"xtrain cpu's peak RSS is {share:.2f} of the lowest other lane's", share <= 1.0)
        if self.plain in self.grown_bytes and "xtrain cpu" in self.grown_bytes:
            share = self.grown_bytes["xtrain cpu"] / self.grown_bytes[self.plain]
            bar = 0.60 if self.vocab_size > 10_000 else 1.0
            yield _verdict(
                f"xtrain cpu grows by {share:.2f} of the plain loop, at most {bar:.2f}", share <= bar
            )

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdicts": list(self.verdicts())}


def _lane(name: str, load: Workload, plain: str, runs: LaneRuns) -> LaneResult:
    own = [run for lane, run in runs if lane == name]
    reference_name = BUILT_IN_PLAIN if "built-in" in name else plain
    reference = next((run for lane, run in runs if lane == reference_name), None)
    ratios = against_plain(name, load, plain, runs)
    return LaneResult(
        name,
        median(tokens_per_second(run, load) for run in own),
        Spread.of(ratios) if ratios else None,
        _median(run.cpu_step_seconds for run in own),
        _median(run.startup_seconds for run in own),
        median(run.peak_bytes for run in own),
        max(largest_difference(reference.losses, run.losses) for run in own) if reference else None,
        [run.step_seconds for run in own],
    )


def _median(values: Iterable[float | None]) -> float | None:
    """None where one was not measured."""
    found = list(values)
    known = [value for value in found if value is not None]
    return median(known) if len(known) == len(found) else None


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
        f"| {_shown(lane.cpu_step_seconds, '.3f')} | {_shown(lane.startup_seconds, '.1f')} "
        f"| {lane.peak_bytes / 2**20:,.0f} | {_shown(lane.loss_difference, '.1e')} |"
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _speed(said: str, found: float, bar: float, low: float) -> str:
    """Noisy where the plain loop beside itself falls as far short of 1 as `found` does of the bar."""
    return f"{said}: noisy" if bar > found >= bar * low else _verdict(said, found >= bar)


def _verdict(said: str, met: bool) -> str:
    return f"{said}: {'met' if met else MISSED}"
