"""Where the lanes of a comparison ran, and with what, side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from xtrain.records.summary import format_bytes
from xtrain.report.comparison import Comparison, Figures
from xtrain.report.tables import Table
from xtrain.report.unlike import chosen_differences, shown

Lanes = Sequence[tuple[str, Figures]]


def environment_table(comparison: Comparison) -> Table:
    """A row for each fact, a column for each lane: what was chosen to differ first."""
    lanes = comparison.finished
    if not lanes:
        return Table("Environment", [], [])
    rows = [[key, *values] for key, values in chosen_differences(lanes).items()]
    facts: dict[str, Callable[[Figures], Any]] = {
        "backend": lambda f: f.backend,
        "processes": lambda f: f.world,
        "threads per process": lambda f: f.threads,
        "precision": lambda f: f.precision,
        "memory: auto": lambda f: f.rung,
        "fp32 matrix products": lambda f: f.matmul_precision,
        "parameters": lambda f: f"{f.parameters:,}",
        "data": lambda f: f.data_hash and f.data_hash[:12],
        "platform": lambda f: f.environment.get("platform"),
        "processor": lambda f: f.environment.get("cpu"),
        "cores": lambda f: f.environment.get("physical_cores"),
        "memory": lambda f: _bytes_or_none(f.environment.get("memory_bytes")),
        "Python": lambda f: f.environment.get("python"),
        "commit": lambda f: _short_commit(f.environment.get("git_commit")),
    }
    rows += [[name, *(_fact(fact(figures)) for _, figures in lanes)] for name, fact in facts.items()]
    rows += [[name, *values] for name, values in _versions(lanes).items()]
    known = [row for row in rows if any(cell != "unknown" for cell in row[1:])]
    return Table("Environment", ["", *(name for name, _ in lanes)], known)


def _fact(value: Any) -> str:
    return "unknown" if value is None or value == "" else shown(value)


def _short_commit(value: Any) -> Any:
    """The first of its 40 digits, and what may follow them: `-changed`."""
    return f"{value[:10]}{value[40:]}" if isinstance(value, str) else value


def _bytes_or_none(value: Any) -> str | None:
    return format_bytes(value) if isinstance(value, int) and 0 < value < 1 << 63 else None


def _versions(lanes: Lanes) -> dict[str, list[str]]:
    packages = [figures.environment.get("packages") for _, figures in lanes]
    tables = [found if isinstance(found, dict) else {} for found in packages]
    names = sorted({name for table in tables for name in table})[:20]
    return {shown(name): [shown(table.get(name) or "none") for table in tables] for name in names}
