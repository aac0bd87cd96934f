"""The runs of a report: records and metrics as they lie on disk, gathered into lanes. None is trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xtrain.errors import RequestError
from xtrain.lanes import LaneEnd, Outcome
from xtrain.records.metrics import StepRecord, read_metrics
from xtrain.records.record import RunRecord, load_record

LANES = "lanes"
"""The folder of a comparison that holds a folder of runs for each lane."""


@dataclass(frozen=True)
class Run:
    record: RunRecord
    steps: list[StepRecord]


@dataclass(frozen=True)
class LaneRuns:
    """The runs of one lane: repeats of the same training on the same engine."""

    name: str
    outcome: Outcome
    reason: str | None
    """Why it did not finish."""
    runs: Sequence[Run]
    """Empty unless it finished."""


def read_run(directory: Path) -> Run:
    """RequestError, with the file and the place in it, for a record or metrics that are none."""
    record = load_record(directory)
    metrics = directory / "metrics.jsonl"
    if not metrics.exists() and record.totals.steps == 0:
        return Run(record, [])  # it ended before its first update
    return Run(record, read_metrics(metrics))


def ended_lane(name: str, ends: Sequence[tuple[LaneEnd, Path]]) -> LaneRuns:
    """A lane that was just run, from how each repeat ended and where it lies; the first failure decides."""
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
    return LaneRuns(name, "finished", None, runs)


def stored_lanes(places: Sequence[str]) -> list[LaneRuns]:
    """From `PATH` or `NAME=PATH` of finished runs and of whole comparisons, in order.

    Runs of one name are repeats of one lane. Without a name it is the folder's, made longer until
    it is its own. Raises RequestError for a place without a run, and for a damaged one.
    """
    found: dict[str, list[Path]] = {}
    for name, paths in _named(places):
        found.setdefault(name, []).extend(paths)
    return [_stored_lane(name, paths) for name, paths in found.items()]


def _stored_lane(name: str, paths: Sequence[Path]) -> LaneRuns:
    runs = [read_run(path) for path in paths]
    failed = next((run for run in runs if run.record.status == "failed"), None)
    if failed is not None:
        return LaneRuns(name, "failed", failed.record.failure or "its record does not say why", [])
    return LaneRuns(name, "finished", None, runs)


def _named(places: Sequence[str]) -> Iterator[tuple[str, list[Path]]]:
    unnamed = [Path(place) for place in places if _split(place)[0] is None]
    short = _short_names(unnamed)
    for place in places:
        given, path = _split(place)
        name = given or short[path]
        lanes = _lanes_of(path)
        if lanes is None:
            yield name, [path]
        else:
            prefix = f"{name}/" if given or len(places) > 1 else ""
            yield from ((f"{prefix}{lane.name}", runs) for lane, runs in lanes)


def _split(place: str) -> tuple[str | None, Path]:
    """(name, path); a path that is there may itself contain the sign."""
    name, sign, path = place.partition("=")
    if not sign or not name or Path(place).exists():
        return None, Path(place)
    return name, Path(path)


def _short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """By path: as many of its last parts as tell all of them apart."""
    parts = {path: path.absolute().parts for path in paths}
    for count in range(1, max((len(found) for found in parts.values()), default=0) + 1):
        names = {path: "/".join(found[-count:]) for path, found in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {path: str(path) for path in paths}


def _lanes_of(path: Path) -> list[tuple[Path, list[Path]]] | None:
    """The lanes of a comparison's folder, each with its runs; None for anything else."""
    folder = path / LANES
    if not folder.is_dir() or (path / "record.json").exists():
        return None
    lanes = sorted(lane for lane in folder.iterdir() if lane.is_dir())
    runs = [(lane, sorted(record.parent for record in lane.glob("*/record.json"))) for lane in lanes]
    found = [(lane, paths) for lane, paths in runs if paths]
    if not found:
        raise RequestError(f"{path}: a comparison in which no lane left a record; nothing to report")
    return found
