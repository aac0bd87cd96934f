"""A comparison for people: a few tables on the terminal, the same as Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

from tabulate import tabulate

from xtrain.comparison import Comparison, Difference, Figures, LaneReport
from xtrain.contract import MEMORY_CATEGORIES
from xtrain.summary import (
    COUNTERS,
    NOT_MEASURED,
    clean,
    format_bytes,
    format_loss,
    format_rate,
)


@dataclass(frozen=True)
class Table:
    title: str
    headers: list[str]
    rows: list[list[str]]


def render_terminal(comparison: Comparison) -> str:
    parts = [f"{t.title}\n{_tabulate(t, 'simple')}" for t in _tables(comparison)]
    parts += [f"warning: {clean(warning)}" for warning in comparison.warnings]
    return "\n\n".join(parts)


def render_markdown(comparison: Comparison) -> str:
    """report.md: method, machine, warnings, tables."""
    parts = [f"# Comparison: {_escape(comparison.spec)}", _method(comparison), _machine(comparison)]
    if comparison.warnings:
        parts.append("\n".join(f"- **Warning:** {_escape(warning)}" for warning in comparison.warnings))
    parts += [f"## {t.title}\n\n{_tabulate(_escaped(t), 'github')}" for t in _tables(comparison)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _method(comparison: Comparison) -> str:
    if comparison.reference is None:
        return "No lane finished."
    return (
        "The same spec on every lane, each in fresh processes, one after another. Differences are the "
        f"largest over all steps, relative to {_escape(comparison.reference)}. Speed is the median over the "
        "steps, with its 10th and 90th percentile; warm-up and traced steps are left out. Memory is that of "
        "the rank that held most."
    )


def _machine(comparison: Comparison) -> str:
    found = comparison.environment
    packages = found.get("packages")
    versions = packages if isinstance(packages, dict) else {}
    memory = found.get("memory_bytes")
    facts = [
        *(str(found[key]) for key in ("platform", "cpu") if found.get(key)),
        *([f"{found['physical_cores']} cores"] if found.get("physical_cores") else []),
        *([format_bytes(memory)] if isinstance(memory, int) and memory < 2**63 else []),
        *([f"Python {found['python']}"] if found.get("python") else []),
        *(f"{name} {version}" for name, version in versions.items() if version),
    ]
    return f"Machine: {_escape(', '.join(facts))}." if facts else ""


def _tables(comparison: Comparison) -> list[Table]:
    finished = [(lane, lane.figures) for lane in comparison.lanes if lane.figures]
    unfinished = [lane for lane in comparison.lanes if not lane.figures]
    tables = []
    if finished:
        tables += [_losses(finished, comparison.reference), _speed(finished), _memory(finished)]
        counted = _step_memory(finished)
        tables += [counted] if counted.rows else []
    if unfinished:
        rows = [[lane.name, lane.outcome, lane.reason or ""] for lane in unfinished]
        tables.append(Table("Lanes without figures", ["lane", "outcome", "reason"], rows))
    return tables


def _losses(lanes: Sequence[tuple[LaneReport, Figures]], reference: str | None) -> Table:
    def difference(lane: LaneReport, found: Difference | None) -> str:
        if lane.name == reference:
            return "reference"
        return NOT_MEASURED if found is None else f"{found.relative:.1e} at step {found.step:,}"

    headers = ["lane", "steps", "loss first", "loss last", "held-out loss"]
    headers += ["largest loss difference", "largest grad norm difference"]
    rows = [
        [
            lane.name,
            f"{figures.steps:,}",
            format_loss(figures.loss.first),
            format_loss(figures.loss.last),
            f"{figures.eval.last:.4f}" if figures.eval else NOT_MEASURED,
            difference(lane, figures.loss_difference),
            difference(lane, figures.grad_norm_difference),
        ]
        for lane, figures in lanes
    ]
    return Table("Losses", headers, rows)


def _speed(lanes: Sequence[tuple[LaneReport, Figures]]) -> Table:
    headers = [
        "lane",
        "tokens/s (10% to 90%)",
        "steps counted",
        "processes",
        "threads",
        "precision",
        "matmul",
    ]
    rows = [
        [
            lane.name,
            format_rate(figures.speed),
            NOT_MEASURED if figures.speed is None else f"{figures.speed.samples:,}",
            f"{figures.world}",
            "unknown" if figures.threads is None else f"{figures.threads}",
            figures.precision or "unknown",
            figures.matmul_precision or "unknown",
        ]
        for lane, figures in lanes
    ]
    return Table("Speed", headers, rows)


def _memory(lanes: Sequence[tuple[LaneReport, Figures]]) -> Table:
    """One column for each way of counting that a lane has: unlike figures never share one."""
    cells = {lane.name: _memory_cells(figures) for lane, figures in lanes}
    columns = [
        (key, method) for key in COUNTERS for method in ("peak (counter)", "peak (sampled)", "at the end")
    ]
    used = [column for column in columns if any(column in found for found in cells.values())]
    headers = ["lane", *(f"{COUNTERS[key]}, {method}" for key, method in used)]
    rows = [[name, *(found.get(column, NOT_MEASURED) for column in used)] for name, found in cells.items()]
    return Table("Memory", headers, rows)


def _step_memory(lanes: Sequence[tuple[LaneReport, Figures]]) -> Table:
    """One row for each lane and place; where nothing was counted there is none."""
    held = [(lane.name, place, one) for lane, figures in lanes for place, one in figures.step_peaks.items()]
    used = [name for name in MEMORY_CATEGORIES if any(one.get(name) for _, _, one in held)]
    rows = [
        [name, place, format_bytes(sum(one.values())), *(format_bytes(one.get(key, 0)) for key in used)]
        for name, place, one in held
    ]
    return Table("Memory of one step at its fullest", ["lane", "on", "total", *used], rows)


def _memory_cells(figures: Figures) -> dict[tuple[str, str], str]:
    """(counter, how it was got) -> bytes as text; without a peak, what it held at the end."""
    found = {}
    for key in COUNTERS:
        counter = getattr(figures, key)
        if counter is not None and counter.peak_bytes is not None and counter.method != "unavailable":
            found[key, f"peak ({counter.method})"] = format_bytes(counter.peak_bytes)
        elif counter is not None:
            found[key, "at the end"] = format_bytes(counter.bytes)
    return found


def _tabulate(table: Table, style: str) -> str:
    rows = [[clean(cell) for cell in row] for row in table.rows]
    return tabulate(rows, headers=table.headers, tablefmt=style, disable_numparse=True)


def _escaped(table: Table) -> Table:
    return Table(table.title, table.headers, [[_escape(cell) for cell in row] for row in table.rows])


def _escape(text: str) -> str:
    """Text from a record as plain text in Markdown: no markup, no table cells of its own."""
    safe = html.escape(clean(text), quote=False)
    for mark in "\\`*_[]|":
        safe = safe.replace(mark, f"\\{mark}")
    return safe
