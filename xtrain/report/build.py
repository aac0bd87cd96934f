"""From lanes to the comparison that people are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xtrain.report.comparison import Comparison, LaneReport
from xtrain.report.figures import figures_of, short
from xtrain.report.fitted import by_rung
from xtrain.report.ladder import ladder_rungs
from xtrain.report.phrases import numbered
from xtrain.report.repeats import repeat_warnings
from xtrain.report.runs import LaneRuns
from xtrain.report.unlike import warnings
from xtrain.report.verdicts import verdicts


def compare_lanes(title: str, lanes: Sequence[LaneRuns]) -> Comparison:
    """In the given order; the first that finished is the reference. Names are cut short, and stay unlike."""
    lanes = [*by_rung(lanes)]
    names = numbered([short(lane.name) for lane in lanes])
    lanes = [replace(lane, name=name) for lane, name in zip(lanes, names, strict=True)]
    reference = next((lane for lane in lanes if lane.runs), None)
    reports = [
        LaneReport(
            name=lane.name,
            outcome=lane.outcome,
            reason=short(lane.reason) if lane.reason else None,
            figures=figures_of(lane.runs, reference.runs) if lane.runs and reference else None,
        )
        for lane in lanes
    ]
    finished = [(lane.name, lane.figures) for lane in reports if lane.figures]
    return Comparison(
        title=title,
        reference=reference.name if reference else None,
        lanes=reports,
        warnings=[*warnings(finished), *repeat_warnings(lanes)],
        verdicts=verdicts(finished, [lane for lane in reports if not lane.figures]),
        ladder=ladder_rungs(
            [(lane.place, made.figures) for lane, made in zip(lanes, reports, strict=True) if lane.place]
        ),
    )
