"""What lanes have in common and where they differ: figures from their records and metrics alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, RequestError
from xtrain.lanes import LaneEnd, Outcome
from xtrain.metrics import Natural, StepRecord, read_metrics
from xtrain.record import (
    CounterFacts,
    Evaluation,
    JsonObject,
    LossFacts,
    Part,
    RunRecord,
    Status,
    load_record,
)
from xtrain.speed import Speed
from xtrain.summary import fullest_step, largest


class Difference(Part):
    """The largest over all steps, relative to the reference lane."""

    relative: float
    step: int


class Figures(Part):
    """Of a lane that finished. What was not measured is None."""

    backend: str
    world: int
    status: Status
    precision: str | None
    threads: int | None
    matmul_precision: str | None
    data_hash: str | None
    parameters: int
    steps: int
    skipped: int
    loss: LossFacts
    eval: Evaluation | None
    loss_difference: Difference | None
    """None for the reference itself, and where no step has a loss in both."""
    grad_norm_difference: Difference | None
    unmatched_steps: int
    """Steps that only one of the two has, or whose loss is finite in only one of them."""
    speed: Speed | None
    live: CounterFacts | None
    """Memory is that of the rank that held most."""
    reserved: CounterFacts | None
    rss: CounterFacts | None
    step_peaks: dict[str, dict[str, Natural]]
    """Of one step at its fullest: by place, then by category."""


class LaneReport(Part):
    name: str
    outcome: Outcome
    reason: str | None
    """Why there are no figures."""
    figures: Figures | None


class Comparison(Part):
    """report.json."""

    schema_version: Literal[1] = 1
    spec: str
    """Name of the spec's file."""
    reference: str | None
    """The lane that the others are held against: the first that finished; None when none did."""
    environment: JsonObject
    """Of the reference."""
    lanes: list[LaneReport]
    warnings: list[str]
    """What makes the lanes unlike, a sentence each; empty when nothing does."""

    @property
    def exit_code(self) -> int:
        """1 when a lane failed after its start, 2 when every lane was refused, else 0."""
        outcomes = {lane.outcome for lane in self.lanes}
        if "failed" in outcomes:
            return EXIT_FAILED
        return EXIT_DONE if "finished" in outcomes else EXIT_REQUEST


@dataclass(frozen=True)
class _Run:
    record: RunRecord
    steps: list[StepRecord]


def compare_runs(spec: str, ends: Sequence[tuple[str, LaneEnd, Path]]) -> Comparison:
    """From (lane, how it ended, run directory) of each lane, in order."""
    lanes, runs = [], {}
    for name, end, directory in ends:
        read = _read(end, directory)
        if isinstance(read, _Run):
            runs[name] = read
            reference = next(iter(runs.values()))
            lanes.append(
                LaneReport(name=name, outcome="finished", reason=None, figures=_figures(read, reference))
            )
        else:
            lanes.append(LaneReport(name=name, outcome=read.outcome, reason=read.reason, figures=None))
    return Comparison(
        spec=spec,
        reference=next(iter(runs), None),
        environment=next(iter(runs.values())).record.environment if runs else {},
        lanes=lanes,
        warnings=_warnings([lane for lane in lanes if lane.figures], runs),
    )


def largest_difference(
    steps: Sequence[StepRecord], reference: Sequence[StepRecord], key: Literal["loss", "grad_norm"]
) -> Difference | None:
    """Over the steps in which both have `key`; None when there is no such step."""
    expected = {step.step: getattr(step, key) for step in reference}
    pairs = [(step.step, getattr(step, key), expected.get(step.step)) for step in steps]
    found = [(_relative(a, b), -step) for step, a, b in pairs if a is not None and b is not None]
    if not found:
        return None
    relative, step = max(found)  # the first of equals
    return Difference(relative=relative, step=-step)


def _relative(value: float, reference: float) -> float:
    """|value - reference| / |reference|; where that is 0, against the other. Always finite."""
    scale = abs(reference) or abs(value)
    return min(abs(value - reference) / scale, sys.float_info.max) if scale else 0.0


def _read(end: LaneEnd, directory: Path) -> _Run | LaneEnd:
    """The run of a lane that finished; else how it ended, in the words of its record where it has one."""
    if end.outcome == "refused":
        return end
    try:
        record = load_record(directory)
        if end.outcome == "failed":
            return LaneEnd("failed", record.failure or end.reason, end.seconds)
        return _Run(record, read_metrics(directory / "metrics.jsonl"))
    except RequestError as error:
        return LaneEnd("failed", end.reason or str(error), end.seconds)


def _figures(run: _Run, reference: _Run) -> Figures:
    record, is_reference = run.record, run is reference
    return Figures(
        backend=record.backend,
        world=record.world,
        status=record.status,
        precision=_precision(record),
        threads=record.threads,
        matmul_precision=record.matmul_precision,
        data_hash=record.data.hash,
        parameters=record.model.parameters,
        steps=record.totals.steps,
        skipped=record.totals.skipped,
        loss=record.loss,
        eval=record.eval,
        loss_difference=None if is_reference else largest_difference(run.steps, reference.steps, "loss"),
        grad_norm_difference=None
        if is_reference
        else largest_difference(run.steps, reference.steps, "grad_norm"),
        unmatched_steps=len(_with_loss(run) ^ _with_loss(reference)),
        speed=record.speed,
        live=largest(record.memory, "live"),
        reserved=largest(record.memory, "reserved"),
        rss=largest(record.memory, "rss"),
        step_peaks=fullest_step(record.memory),
    )


def _with_loss(run: _Run) -> set[int]:
    return {step.step for step in run.steps if step.loss is not None}


def _precision(record: RunRecord) -> str | None:
    section = record.spec.get("precision")
    if not isinstance(section, dict):
        return None
    dtype, weights = section.get("dtype"), section.get("weights")
    return f"{dtype}" if dtype == weights else f"{dtype} over {weights} weights"


def _warnings(lanes: Sequence[LaneReport], runs: dict[str, _Run]) -> list[str]:
    """What a reader must know before believing the table."""
    found = [
        _unlike(lanes, "data_hash", "the lanes saw different data: their losses cannot be compared"),
        _unlike(lanes, "parameters", "the lanes trained different models"),
        _unlike(lanes, "precision", "precision differs: losses agree only roughly"),
        _unlike(lanes, "threads", "threads per process differ, and with them the speed"),
        _unlike(lanes, "matmul_precision", "the precision of fp32 matrix products differs"),
        _unlike(lanes, "skipped", "the lanes skipped different numbers of steps"),
    ]
    found += [
        f"{lane.name}: {lane.figures.unmatched_steps} steps lack a finite loss here or in the reference"
        for lane in lanes
        if lane.figures and lane.figures.unmatched_steps
    ]
    if any(_dropout(run.record) for run in runs.values()):
        found.append("dropout is on: the losses of unlike engines agree only statistically")
    return [warning for warning in found if warning is not None]


def _unlike(lanes: Sequence[LaneReport], key: str, meaning: str) -> str | None:
    values = {lane.name: getattr(lane.figures, key) for lane in lanes}
    if len(set(values.values())) < 2:
        return None
    listed = ", ".join(f"{name} {'unknown' if value is None else value}" for name, value in values.items())
    return f"{meaning} ({listed})"


def _dropout(record: RunRecord) -> bool:
    model = record.spec.get("model")
    return isinstance(model, dict) and bool(model.get("dropout"))
