"""Are the runs of one lane repeats of each other? Their speeds are one figure, and their losses one curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from xtrain.errors import RequestError
from xtrain.printable import printable
from xtrain.records.record import RunRecord
from xtrain.report.runs import LaneRuns, Run
from xtrain.report.unlike import MACHINE, shown
from xtrain.resume import differences
from xtrain.spec.keys import covering

MAY_DIFFER = ("checkpoint", "data.path", "log")
"""Keys that neither change what is learned nor how fast; data is known by its hash."""
MOST_DIFFERENCES = 4


def require_repeats(lane: LaneRuns) -> None:
    """RequestError where a run of `lane` is of another training, engine or size than its first."""
    for run in lane.runs[1:]:
        if found := _differences(lane.runs[0].record, run.record):
            more = f" and {len(found) - MOST_DIFFERENCES} more" if len(found) > MOST_DIFFERENCES else ""
            raise RequestError(
                printable(
                    f"{lane.name}: {_place(run)} is no repeat of {_place(lane.runs[0])}: "
                    f"{', '.join(found[:MOST_DIFFERENCES])}{more}; "
                    "expected runs of one training on one engine: give them names of their own, A=PATH B=PATH"
                )
            )


def repeat_warnings(lanes: Sequence[LaneRuns]) -> list[str]:
    """What a reader must know of lanes whose repeats are the same training, and yet not alike."""
    found = []
    for lane in lanes:
        steps = [run.record.totals.steps for run in lane.runs]
        if len(set(steps)) > 1:
            found.append(f"{lane.name}: its repeats took {', '.join(f'{count:,}' for count in steps)} steps")
        if len({_machine(run.record) for run in lane.runs}) > 1:
            found.append(
                f"{lane.name}: its repeats ran on different machines, and their speeds differ by that"
            )
        if len({str(run.record.environment.get("packages")) for run in lane.runs}) > 1:
            found.append(f"{lane.name}: its repeats ran with different versions")
    return found


def _differences(first: RunRecord, other: RunRecord) -> list[str]:
    facts = {
        "backend": (first.backend, other.backend),
        "processes": (first.world, other.world),
        "data": (first.data.hash, other.data.hash),
    }
    found = [(key, ours, theirs) for key, (ours, theirs) in facts.items() if ours != theirs]
    found += [
        (key, ours, theirs)
        for key, ours, theirs in differences(first.spec, other.spec)
        if covering(key, MAY_DIFFER) is None
    ]
    return [f"{shown(key)} {shown(theirs)} instead of {shown(ours)}" for key, ours, theirs in found]


def _machine(record: RunRecord) -> str:
    return str([record.environment.get(key) for key in MACHINE])


def _place(run: Run) -> Path | str:
    return run.directory or "a run"
