"""The runs of a report: records and metrics as they lie on disk, gathered into lanes. None is trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xtrain.errors import RequestError
from xtrain.lanes import LaneEnd, Outcome
from xtrain.records.metrics import StepRecord, read_metrics
from xtrain.records.record import RunRecord, load_record
from xtrain.records.rundir import RunDirectory
from xtrain.records.summary import format_loss, plural
from xtrain.rungs import LadderPlace


@dataclass(frozen=True)
class Run:
    record: RunRecord
    steps: list[StepRecord]
    directory: Path | None = None
    """Where it lies."""


@dataclass(frozen=True)
class LaneRuns:
    """The runs of one lane: repeats of the same training on the same engine."""

    name: str
    outcome: Outcome
    reason: str | None
    """Why it did not finish."""
    runs: Sequence[Run]
    """Empty unless it finished."""
    place: LadderPlace | None = None
    """None where no ladder was climbed."""


def read_run(directory: Path) -> Run:
    """RequestError, with the file and the place in it, for a record or metrics that are none."""
    record = load_record(directory)
    metrics = directory / "metrics.jsonl"
    if not metrics.exists() and record.totals.steps == 0:
        return Run(record, [], directory)  # it ended before its first update
    return Run(record, read_metrics(metrics), directory)


def ended_lane(name: str, ends: Sequence[tuple[LaneEnd, Path]]) -> LaneRuns:
    """A lane of a comparison, from how each repeat ended and where it lies; the first failure decides."""
    runs = []
    for end, directory in ends:
        if end.outcome == "refused":
            return LaneRuns(name, "refused", end.reason, [])
        try:
            run = read_run(directory)
        except RequestError as error:
            return LaneRuns(name, "failed", end.reason or str(error), [])
        if end.outcome == "failed":
            return LaneRuns(name, "failed", run.record.failure or end.reason, [])
        runs.append(run)
    if not runs:
        return LaneRuns(name, "failed", "the comparison ended before its first run did", [])
    return LaneRuns(name, "finished", None, runs)


def stored_lane(name: str, directories: Sequence[Path]) -> LaneRuns:
    """A lane of runs that ended somewhere, some time; the first that failed or was killed decides.

    Raises RequestError for a place without a run, and for a damaged one.
    """
    runs = []
    for directory in directories:
        if killed := _killed(directory):
            return LaneRuns(name, "failed", killed, [])
        run = read_run(directory)
        if run.record.status == "failed":
            return LaneRuns(name, "failed", run.record.failure or "its record does not say why", [])
        runs.append(run)
    return LaneRuns(name, "finished", None, runs)


def _killed(directory: Path) -> str | None:
    """Why a run directory has no record; None where it has one, and where there was no run."""
    try:
        files = RunDirectory.open(directory)
    except RequestError:
        return None
    if files.record.exists():
        return None
    steps = read_metrics(files.metrics) if files.metrics.exists() else []
    loss = f", the last loss {format_loss(steps[-1].loss)}" if steps else ""
    return f"it left no record: it was killed, or still runs ({plural(len(steps), 'step')} done{loss})"
