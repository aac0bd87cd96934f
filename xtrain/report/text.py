"""A comparison on the terminal and as Markdown: verdicts first, then the tables."""

from __future__ import annotations

import html

from tabulate import tabulate

from xtrain.records.summary import clean
from xtrain.report.comparison import Comparison
from xtrain.report.environment import environment_table
from xtrain.report.tables import Table, tables


def render_terminal(comparison: Comparison) -> str:
    parts = ["\n".join(f"warning: {clean(warning)}" for warning in comparison.warnings)]
    for verdict in comparison.verdicts:
        details = "".join(f"\n  {clean(detail)}" for detail in verdict.details)
        parts.append(f"{clean(verdict.headline)}{details}")
    parts += [f"{table.title}\n{_tabulate(table, 'simple')}" for table in tables(comparison)]
    return "\n\n".join(part for part in parts if part)


def render_markdown(comparison: Comparison) -> str:
    """report.md: warnings, verdicts, method, tables, environment."""
    parts = [f"# {_escape(comparison.title)}"]
    parts.append("\n".join(f"- **Warning:** {_escape(warning)}" for warning in comparison.warnings))
    for verdict in comparison.verdicts:
        parts.append(f"**{_escape(verdict.headline)}.**")
        parts.append("\n".join(f"- {_escape(detail)}" for detail in verdict.details))
    parts.append(_escape(method(comparison)))
    both = [*tables(comparison), environment_table(comparison)]
    parts += [f"## {table.title}\n\n{_tabulate(_escaped(table), 'github')}" for table in both if table.rows]
    return "\n\n".join(part for part in parts if part) + "\n"


def method(comparison: Comparison) -> str:
    """How the figures were got, in a few sentences."""
    if comparison.reference is None:
        return "No lane finished."
    return (
        f"Differences of losses are the largest over all steps, relative to {comparison.reference}. "
        "Speed is the median over the steps of the repeat in the middle, with its 10th and 90th percentile; "
        "warm-up and traced steps are left out. Between lanes, noise is the 95% interval of Student's t over "
        "their repeats. A token costs 6 N + 12 L H T operations. Memory is that of the rank and repeat that "
        "held most."
    )


def _tabulate(table: Table, style: str) -> str:
    rows = [[clean(cell) for cell in row] for row in table.rows]
    headers = [clean(header) for header in table.headers]
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)


def _escaped(table: Table) -> Table:
    headers = [_escape(header) for header in table.headers]
    return Table(table.title, headers, [[_escape(cell) for cell in row] for row in table.rows])


def _escape(text: str) -> str:
    """Text from a record as plain text in Markdown: no markup, no table cells of its own."""
    safe = html.escape(clean(text), quote=False)
    for mark in "\\`*_[]|":
        safe = safe.replace(mark, f"\\{mark}")
    return safe
