"""What `xtrain report` is given: run directories and whole comparisons, and what their lanes are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from xtrain.errors import RequestError
from xtrain.printable import printable
from xtrain.report.folder import is_comparison, read_lanes
from xtrain.report.repeats import require_repeats
from xtrain.report.runs import LaneRuns, stored_lane


def stored_lanes(places: Sequence[str]) -> list[LaneRuns]:
    """From `PATH` or `NAME=PATH` of finished runs and of whole comparisons, in order.

    Runs of one name are repeats of one lane. Without a name it is the folder's, made longer until
    it is its own. Raises RequestError for a place without a run, for a damaged one, for a run that stands
    twice, and for runs of one name that are no repeats of each other.
    """
    found: dict[str, LaneRuns] = {}
    for lane in _named(places):
        found[lane.name] = _joined(found[lane.name], lane) if lane.name in found else lane
    lanes = [*found.values()]
    _require_once(lanes)
    for lane in lanes:
        require_repeats(lane)
    return lanes


def _joined(lane: LaneRuns, more: LaneRuns) -> LaneRuns:
    """The runs of both; a failure of either decides."""
    unfinished = next((one for one in (lane, more) if one.outcome != "finished"), None)
    return unfinished or replace(lane, runs=[*lane.runs, *more.runs])


def _require_once(lanes: Sequence[LaneRuns]) -> None:
    seen: set[Path] = set()
    for path in (run.directory.resolve() for lane in lanes for run in lane.runs if run.directory):
        if path in seen:
            raise RequestError(
                printable(f"{path} stands twice; expected each run once: it is one measurement")
            )
        seen.add(path)


def _named(places: Sequence[str]) -> Iterator[LaneRuns]:
    unnamed = [Path(place) for place in places if _split(place)[0] is None]
    short = _short_names(unnamed)
    for place in places:
        given, path = _split(place)
        name = given or short[path]
        if not is_comparison(path):
            yield stored_lane(name, [path])
            continue
        prefix = f"{name}/" if given or len(places) > 1 else ""
        yield from (replace(lane, name=f"{prefix}{lane.name}") for lane in read_lanes(path))


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
