"""The folder of a comparison: its runs, lane by lane, and a list of how each of them ended.

The list is written as the runs end, so a comparison that is cut off can be reported all the same. It is
read back like a record: not trusted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError

from xtrain.errors import RequestError
from xtrain.jsonfile import read_json
from xtrain.lanes import LaneEnd, Outcome, last_error
from xtrain.printable import printable
from xtrain.records.record import Part
from xtrain.records.rundir import write_json
from xtrain.report.runs import LaneRuns, ended_lane, stored_lane
from xtrain.rungs import RUNGS, LadderPlace

LANES = "lanes"
"""Holds a folder of runs for each lane."""
LIST = "lanes.json"


def _plain(name: str) -> str:
    """The name of something right here, and no path to elsewhere."""
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set("/\\"):
        raise ValueError(f"{name!r} is no name of a folder")
    return name


class StoredEnd(Part):
    """How one run ended; see xtrain.lanes.LaneEnd."""

    run: Annotated[str, AfterValidator(_plain)]
    outcome: Outcome
    reason: str | None
    seconds: float


class StoredLane(Part):
    name: str
    folder: Annotated[str, AfterValidator(_plain)]
    ladder: str | None = None
    """None where no ladder was climbed."""
    rung: Annotated[int, Field(ge=0, lt=len(RUNGS))] = 0
    ends: list[StoredEnd]


class StoredLanes(Part):
    """lanes.json."""

    schema_version: Literal[1] = 1
    lanes: list[StoredLane]
    """In the order of the command."""


def write_list(out: Path, lanes: Sequence[StoredLane]) -> None:
    """Raises OSError."""
    write_json(out / LIST, StoredLanes(lanes=list(lanes)).model_dump(mode="json"))


def is_comparison(path: Path) -> bool:
    return (path / LANES).is_dir() and not (path / "record.json").exists()


def read_lanes(path: Path) -> list[LaneRuns]:
    """Of a comparison's folder; lanes that left no record are among them.

    Raises RequestError where the list is damaged, and where there is no lane.
    """
    if (path / LIST).exists():
        lanes = [_listed_lane(path / LANES, lane) for lane in _read_list(path / LIST)]
    else:
        folders = (folder for folder in (path / LANES).iterdir() if folder.is_dir())
        lanes = [_found_lane(folder) for folder in sorted(folders, key=_in_order)]
    if not lanes:
        raise RequestError(f"{path}: a comparison without any lane; nothing to report")
    return lanes


def _read_list(file: Path) -> list[StoredLane]:
    try:
        return StoredLanes.model_validate(read_json(file)).lanes
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RequestError(printable(f"{file} is no list of lanes: {key}: {first['msg']}")) from None


def _listed_lane(lanes: Path, lane: StoredLane) -> LaneRuns:
    folder = lanes / lane.folder
    ends = [(LaneEnd(end.outcome, end.reason, end.seconds), folder / end.run) for end in lane.ends]
    found = ended_lane(lane.name, ends)
    return replace(found, place=LadderPlace(lane.ladder, lane.rung)) if lane.ladder else found


def _found_lane(folder: Path) -> LaneRuns:
    """Of a comparison that left no list: by its runs, or by their output."""
    runs = sorted((run for run in folder.iterdir() if run.is_dir()), key=_in_order)
    logs = sorted(folder.glob("run-*.log"), key=_in_order)
    try:
        if runs:
            return stored_lane(folder.name, runs)
        reason = last_error(logs[0]) if logs else "it left no record"
    except RequestError as error:
        reason = str(error)
    return LaneRuns(folder.name, "failed", reason, [])


def _in_order(path: Path) -> list[tuple[int, str]]:
    """Numbers by their value: run-2 comes before run-10."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
