"""The charts of a page as plain data in Plotly's form: no library is needed to make or to test them.

Colours of text, lines and background come from the page, which knows whether it is light or dark.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from xtrain.contract import MEMORY_CATEGORIES
from xtrain.measure.speed import PHASE_NAMES, PHASES
from xtrain.records.summary import COUNTERS, clean
from xtrain.report.agreement import relative_difference
from xtrain.report.colours import CATEGORY_COLOURS, PHASE_COLOURS, lane_colours
from xtrain.report.comparison import Comparison, Curve, Figures
from xtrain.report.memory import fullest_device
from xtrain.report.phrases import numbered

Lanes = Sequence[tuple[str, Figures]]
"""By label, each another: to Plotly equal ones are one bar."""
Trace = dict[str, Any]

LONGEST_LABEL, LABEL_LINE = 60, 20
"""Characters."""
BAR_HEIGHT, LINE_HEIGHT, FRAME_HEIGHT, CURVE_HEIGHT = 38, 19, 90, 340
"""Pixels: of one lane's bar, of a line of its label, of everything round the bars, of a chart of curves."""


@dataclass(frozen=True)
class Chart:
    name: str
    """Its id on the page."""
    title: str
    caption: str
    height: int
    data: list[Trace]
    layout: dict[str, Any] = field(default_factory=dict)


def charts(comparison: Comparison) -> list[Chart]:
    """Those that have something to show."""
    finished, colour_of = comparison.finished, lane_colours(comparison)
    labels = numbered([label(name) for name, _ in finished])
    lanes = [(text, figures) for text, (_, figures) in zip(labels, finished, strict=True)]
    colours = {text: colour_of[name] for text, (name, _) in zip(labels, finished, strict=True)}
    found = [
        _ladder(comparison),
        _speed(lanes, colours),
        _step_memory(lanes),
        _losses(lanes, colours),
        _distance(lanes, colours, comparison.reference),
        _time(lanes),
        _predicted(lanes),
        *(_memory_over_time(lanes, colours, counter) for counter in COUNTERS),
    ]
    return [chart for chart in found if chart.data]


def label(text: str) -> str:
    """Text from a record as Plotly shows it, in short lines: no tag that it knows may come through.

    Long names keep both ends: lanes of one comparison begin alike.
    """
    found, half = clean(text), LONGEST_LABEL // 2
    short = found if len(found) <= LONGEST_LABEL else f"{found[:half]}...{found[-half:]}"
    return "<br>".join(html.escape(line, quote=False) for line in wrap(short, LABEL_LINE))


def trace_colour(trace: Trace) -> str:
    """Of a trace with a name, for its key."""
    return str(trace["line"]["color"] if "line" in trace else trace["marker"]["color"])


def _speed(lanes: Lanes, colours: Mapping[str, str]) -> Chart:
    timed = [(name, figures.speed, figures.repeat_rates) for name, figures in lanes if figures.speed]
    names = [name for name, _, _ in timed]
    bars: Trace = {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [speed.tokens_per_second for _, speed, _ in timed],
        "marker": {"color": [colours[name] for name, _, _ in timed]},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [speed.p90 - speed.tokens_per_second for _, speed, _ in timed],
            "arrayminus": [speed.tokens_per_second - speed.p10 for _, speed, _ in timed],
        },
        "hovertemplate": "%{y}: %{x:,.0f} tokens/s<extra></extra>",
    }
    dots: Trace = {
        "type": "scatter",
        "mode": "markers",
        "y": [name for name, (_, _, rates) in zip(names, timed, strict=True) for _ in rates],
        "x": [rate for _, _, rates in timed for rate in rates],
        "marker": {"symbol": "line-ns-open", "size": 14, "line": {"width": 2}},
        "hovertemplate": "a repeat: %{x:,.0f} tokens/s<extra></extra>",
    }
    caption = "Bars: the repeat in the middle; whiskers: 10% to 90% of its steps; ticks: every repeat."
    layout = {"xaxis": {"title": {"text": "tokens/s"}, "rangemode": "tozero", "tickformat": ","}}
    return Chart("speed", "Speed", caption, _bar_height(names), [bars, dots] if timed else [], _bars(layout))


def _losses(lanes: Lanes, colours: Mapping[str, str]) -> Chart:
    traces = [
        _line(name, figures.loss_curve, colours[name], number) for number, (name, figures) in enumerate(lanes)
    ]
    caption = "Training loss, the lanes over each other: the first drawn widest, so that equal curves show."
    data = [trace for trace in traces if trace["x"]]
    return Chart("losses", "Loss", caption, CURVE_HEIGHT, data, _curves("loss"))


def _line(name: str, curve: Curve, colour: str, number: int) -> Trace:
    """Later lanes are drawn thinner, on top."""
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": curve.steps,
        "y": curve.values,
        "line": {
            "color": colour,
            "width": max(1.5, 7 - 2.5 * number),
            "dash": "solid" if number < 2 else "dot",
        },
        "opacity": 0.55 if number == 0 else 1,
    }


def _dotted(name: str, curve: Curve, colour: str, number: int) -> Trace:
    """With its points: there may be few."""
    return {**_line(name, curve, colour, number), "mode": "lines+markers", "marker": {"size": 4}}


def _distance(lanes: Lanes, colours: Mapping[str, str], reference: str | None) -> Chart:
    """From the first lane's, `reference` by its full name. A logarithmic axis has no place for 0."""
    expected = lanes[0][1].loss_curve if lanes else Curve(steps=[], values=[])
    values = dict(zip(expected.steps, expected.values, strict=True))
    traces = []
    for name, figures in lanes[1:]:
        curve = figures.loss_curve
        pairs = [
            (s, relative_difference(v, values[s]))
            for s, v in zip(curve.steps, curve.values, strict=True)
            if s in values
        ]
        drawn = [(step, distance) for step, distance in pairs if distance > 0]
        if drawn:
            points = Curve(steps=[step for step, _ in drawn], values=[distance for _, distance in drawn])
            traces.append(_dotted(name, points, colours[name], 9))
    caption = f"Relative difference of the loss from {clean(reference or '')}'s. Equal steps have no point."
    layout = _curves("relative difference")
    layout["yaxis"] |= {"type": "log", "exponentformat": "power", "dtick": 1, "range": _decades(traces)}
    return Chart("distance", "Distance from the reference", caption, CURVE_HEIGHT, traces, layout)


def _decades(traces: Sequence[Trace]) -> list[int]:
    """Whole powers of ten round all values, as exponents."""
    exponents = [math.log10(value) for trace in traces for value in trace["y"]]
    return [math.floor(min(exponents)), math.ceil(max(exponents) + 1e-9)] if exponents else [-1, 0]


def _step_memory(lanes: Lanes) -> Chart:
    held = {name: fullest_device(figures) for name, figures in lanes if figures.step_peaks}
    caption = "Live tensors of one step at its fullest, counted storage by storage, on the fullest device."
    return _stacked_bytes("memory", "Memory by category", caption, held)


def _predicted(lanes: Lanes) -> Chart:
    held = {}
    for name, figures in lanes:
        place = next(iter(figures.step_peaks), "")
        if place in figures.predicted:
            held[f"{name}, predicted"] = figures.predicted[place]
            held[f"{name}, measured"] = figures.step_peaks[place]
    caption = "What the planner said before the run, and what the step held, on the fullest device."
    return _stacked_bytes("predicted", "Predicted and measured", caption, held)


def _stacked_bytes(name: str, title: str, caption: str, held: Mapping[str, Mapping[str, int]]) -> Chart:
    """A bar for each entry of `held`, a colour for each category."""
    largest = max((sum(one.values()) for one in held.values()), default=0)
    unit, divisor = ("GiB", 1 << 30) if largest >= 1 << 30 else ("MiB", 1 << 20)
    used = [key for key in MEMORY_CATEGORIES if any(one.get(key) for one in held.values())]
    data: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": key,
            "y": list(held),
            "x": [one.get(key, 0) / divisor for one in held.values()],
            "marker": {"color": CATEGORY_COLOURS[key]},
            "hovertemplate": f"%{{y}}: {key} %{{x:,.2f}} {unit}<extra></extra>",
        }
        for key in used
    ]
    layout = _bars({"barmode": "stack", "xaxis": {"title": {"text": unit}}})
    return Chart(name, title, caption, _bar_height(held), data, layout)


def _time(lanes: Lanes) -> Chart:
    splits = {name: figures.time_split.seconds for name, figures in lanes if figures.time_split}
    data: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": PHASE_NAMES.get(phase, phase),
            "y": list(splits),
            "x": [1000 * seconds.get(phase, 0.0) for seconds in splits.values()],
            "marker": {"color": PHASE_COLOURS[phase]},
            "hovertemplate": f"%{{y}}: {PHASE_NAMES.get(phase, phase)} %{{x:,.1f}} ms<extra></extra>",
        }
        for phase in PHASES
        if any(phase in seconds for seconds in splits.values())
    ]
    caption = "The mean of the traced steps, which wait for the device after every phase."
    layout = _bars({"barmode": "stack", "xaxis": {"title": {"text": "milliseconds"}}})
    return Chart("time", "Time of a step", caption, _bar_height(splits), data, layout)


def _memory_over_time(lanes: Lanes, colours: Mapping[str, str], counter: str) -> Chart:
    """One chart for each counter: unlike ones never share an axis."""
    curves = {
        name: figures.memory_curves[counter] for name, figures in lanes if counter in figures.memory_curves
    }
    largest = max((value for curve in curves.values() for value in curve.values), default=0)
    unit, divisor = ("GiB", 1 << 30) if largest >= 1 << 30 else ("MiB", 1 << 20)
    data = []
    for number, (name, curve) in enumerate(curves.items()):
        scaled = Curve(steps=curve.steps, values=[value / divisor for value in curve.values])
        data.append(_dotted(name, scaled, colours[name], number))
    counted = COUNTERS[counter]
    caption = f"{counted[0].upper()}{counted[1:]}, of the first rank, at the ends of logging windows."
    layout = _curves(unit)
    layout["yaxis"] |= {"rangemode": "tozero"}
    return Chart(f"memory-{counter}", "Memory over time", caption, CURVE_HEIGHT - 60, data, layout)


def _ladder(comparison: Comparison) -> Chart:
    several = len({rung.lane for rung in comparison.ladder}) > 1
    rungs = [
        rung for rung in comparison.ladder if rung.memory_share is not None or rung.speed_share is not None
    ]
    labels = numbered([label(f"{rung.lane} {rung.name}" if several else rung.name) for rung in rungs])
    data: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [getattr(rung, key) for rung in rungs],
            "marker": {"color": colour},
            "hovertemplate": f"%{{y}}: {name} %{{x:.0%}}<extra></extra>",
        }
        for name, key, colour in (("memory", "memory_share", "#e8743b"), ("speed", "speed_share", "#3b7ddd"))
        if rungs
    ]
    caption = "Measured, as shares of the first rung: live tensors of a step, and tokens per second."
    layout = _bars({"barmode": "group", "xaxis": {"tickformat": ".0%"}})
    return Chart("ladder", "The ladder", caption, _bar_height(labels, 58), data, layout)


def _bar_height(labels: Iterable[str], least: int = BAR_HEIGHT) -> int:
    """All bars are as high as the one with the longest label needs."""
    lines = [label.count("<br>") + 1 for label in labels]
    highest = max((LINE_HEIGHT * count + 8 for count in lines), default=0)
    return FRAME_HEIGHT + max(least, highest) * max(1, len(lines))


def _bars(layout: dict[str, Any]) -> dict[str, Any]:
    """The first lane on top."""
    return {"yaxis": {"autorange": "reversed", "automargin": True, "type": "category"}, **layout}


def _curves(y_title: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": "step"}},
        "yaxis": {"title": {"text": y_title}, "automargin": True},
        "hovermode": "x unified",
    }
