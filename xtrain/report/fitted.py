"""What `memory: auto` chose for the runs of a lane: with unlike techniques they are no repeats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from xtrain.records.record import RunRecord
from xtrain.report.runs import LaneRuns
from xtrain.report.unlike import shown


def chosen_rung(record: RunRecord) -> str | None:
    """The rung that a run ended on; None where its spec named its techniques."""
    chosen = record.settings.get("memory_auto")
    rung = chosen.get("rung") if isinstance(chosen, dict) else None
    return None if rung is None else shown(rung)


def by_rung(lanes: Sequence[LaneRuns]) -> Iterator[LaneRuns]:
    """A lane whose runs landed on several rungs is one for each, in the order of the first runs."""
    for lane in lanes:
        rungs = dict.fromkeys(chosen_rung(run.record) for run in lane.runs)
        if len(rungs) < 2:
            yield lane
            continue
        for rung in rungs:
            runs = [run for run in lane.runs if chosen_rung(run.record) == rung]
            yield replace(lane, name=f"{lane.name}, {rung or 'unknown'}", runs=runs)
