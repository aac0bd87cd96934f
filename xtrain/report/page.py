"""One page that needs nothing else: no network, no files beside it. What records say is only ever text.

Scripts run by their hash alone (Content-Security-Policy): even markup that got through would do nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from string import Template

from xtrain.errors import RequestError
from xtrain.records.summary import NOT_MEASURED, clean, format_bytes, format_loss
from xtrain.report.charts import Chart, charts, trace_colour
from xtrain.report.colours import lane_colours
from xtrain.report.comparison import Comparison, Figures, LaneReport, Verdict
from xtrain.report.environment import environment_table
from xtrain.report.memory import STEP, instruments
from xtrain.report.tables import Table, tables
from xtrain.report.text import method

TOPICS = {
    "losses": "Do the losses agree?",
    "speed": "Which is faster?",
    "memory": "Which needs less memory?",
    "bottleneck": "What is the bottleneck?",
    "choice": "When to choose which?",
}


class LibraryMissing(RequestError):
    """The library of the charts is not installed."""


def chart_library() -> str:
    """Plotly's own JavaScript, as its package ships it. LibraryMissing says how to get it."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise LibraryMissing(
            "the page needs plotly, which came with xtrain and is not there any more: pip install plotly"
        ) from None
    return str(get_plotlyjs())


def render_page(comparison: Comparison, library: str) -> str:
    """The whole page; `library` is what chart_library gives."""
    drawn = charts(comparison)
    script = _asset("page.js")
    return Template(_asset("page.html")).substitute(
        hashes=" ".join(f"'sha256-{_hash(source)}'" for source in (library, script)),
        title=_text(comparison.title),
        style=_asset("page.css"),
        warnings=_warnings(comparison.warnings),
        lanes="\n".join(_lane(lane, colour) for lane, colour in _coloured(comparison)),
        verdicts=_section(
            "Verdicts", "grid verdicts", [_verdict(verdict) for verdict in comparison.verdicts]
        ),
        charts=_section("Charts", "grid charts", [_chart(chart) for chart in drawn]),
        tables="\n".join(_table(table) for table in _all_tables(comparison)),
        method=_text(method(comparison)),
        chart_data=_json(drawn),
        library=library,
        script=script,
    )


def _asset(name: str) -> str:
    return resources.files("xtrain.report").joinpath(name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _json(drawn: Sequence[Chart]) -> str:
    """Inside a script element: `<` must not be there, or text could end the element."""
    text = json.dumps([asdict(chart) for chart in drawn], allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _text(text: str) -> str:
    return escape(clean(text), quote=True)


def _all_tables(comparison: Comparison) -> list[Table]:
    return [table for table in (*tables(comparison), environment_table(comparison)) if table.rows]


def _coloured(comparison: Comparison) -> list[tuple[LaneReport, str]]:
    colours = lane_colours(comparison)
    return [(lane, colours[lane.name]) for lane in comparison.lanes]


def _section(title: str, classes: str, parts: Sequence[str]) -> str:
    if not parts:
        return ""
    inner = "\n".join(parts)
    return f'<h2>{title}</h2>\n<section class="{classes}">\n{inner}\n</section>'


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{_text(warning)}</li>" for warning in warnings)
    return f'<ul class="warnings" role="alert">{items}</ul>'


def _lane(lane: LaneReport, colour: str) -> str:
    name = f'<div class="name">{_text(lane.name)}</div>'
    if lane.figures is None:
        said = f'<div class="big">{_text(lane.outcome)}</div><p>{_text(lane.reason or "")}</p>'
        return f'<article class="card lane failed">{name}{said}</article>'
    facts = "".join(f"<dt>{_text(key)}</dt><dd>{_text(value)}</dd>" for key, value in _facts(lane.figures))
    return (
        f'<article class="card lane" style="--lane: {colour}">{name}'
        f'<div class="big">{_rate(lane.figures)}</div><dl>{facts}</dl></article>'
    )


def _rate(figures: Figures) -> str:
    if figures.speed is None:
        return f"<small>speed {NOT_MEASURED}</small>"
    return f"{figures.speed.tokens_per_second:,.0f} <small>tokens/s</small>"


def _facts(figures: Figures) -> list[tuple[str, str]]:
    """What one looks for first."""
    facts = [("last loss", format_loss(figures.loss.last)), ("precision", figures.precision or "unknown")]
    held = instruments([("", figures)])
    facts += [(_named(instrument), format_bytes(peak[""])) for instrument, peak in [*held.items()][:1]]
    use = figures.field_speed.utilisation if figures.field_speed else None
    facts += [("MFU", f"{use:.0%}")] if use is not None else []
    facts.append(("steps", f"{figures.steps:,}{f' x {figures.repeats} runs' if figures.repeats > 1 else ''}"))
    return facts


def _named(instrument: str) -> str:
    return "step memory" if instrument == STEP else "peak memory"


def _verdict(verdict: Verdict) -> str:
    details = "".join(f"<li>{_text(detail)}</li>" for detail in verdict.details)
    return (
        f'<article class="card verdict {verdict.tone}"><p class="topic">{TOPICS[verdict.topic]}</p>'
        f"<h3>{_text(verdict.headline)}</h3>{f'<ul>{details}</ul>' if details else ''}</article>"
    )


def _chart(chart: Chart) -> str:
    return (
        f'<figure class="card"><h3>{_text(chart.title)}</h3><p class="caption">{_text(chart.caption)}</p>'
        f"{_keys(chart)}"
        f'<div class="chart" id="{chart.name}" style="height: {chart.height}px"></div></figure>'
    )


def _keys(chart: Chart) -> str:
    """The legend: the library's own does not fit a narrow page. Names are made safe by charts.label."""
    keys = "".join(
        f'<li style="--key: {trace_colour(trace)}">{trace["name"].replace("<br>", " ")}</li>'
        for trace in chart.data
        if "name" in trace
    )
    return f'<ul class="keys">{keys}</ul>' if keys else ""


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(header)}</th>" for header in table.headers)
    rows = "\n".join(_row(table, row) for row in table.rows)
    return (
        f'<section class="card table"><h3>{_text(table.title)}</h3><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></section>"
    )


def _row(table: Table, row: Sequence[str]) -> str:
    """Each cell has its header: narrow pages show rows as lists."""
    if table.title == "Environment" and len(row) > 2:
        return _environment_row(table.headers, row)
    return f"<tr>{_cells(table.headers, row)}</tr>"


def _environment_row(headers: Sequence[str], row: Sequence[str]) -> str:
    """What all lanes have alike is said once; what is unlike stands out."""
    if len(set(row[1:])) > 1:
        return f'<tr class="apart">{_cells(headers, row)}</tr>'
    alike = f'<td data-label="all lanes" colspan="{len(row) - 1}">{_text(row[1])}</td>'
    return f"<tr>{_cells(headers[:1], row[:1])}{alike}</tr>"


def _cells(headers: Sequence[str], row: Sequence[str]) -> str:
    return "".join(
        f'<td data-label="{_text(header)}">{_text(cell)}</td>'
        for header, cell in zip(headers, row, strict=True)
    )
