"""From the rows of `make gpu` to a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.gpu_lanes import Row

METHOD = """\
Every lane is a process of its own with a time limit of its own; what was not done is a row with its reason.

- *tokens/s*: xtrain's is the median of its steps without warm-up and traced ones; the plain loop's is that of
  all steps after the first 5, between two synchronisations.
- *MFU*: 6 N + 12 L H T operations a token over the data sheet's dense bf16 rate (989 TFLOP/s on H100 and
  H200); causal attention is counted as if it were whole, recomputation is not counted.
- *peak*: the most bytes in live tensors, by the allocator's counter. *planned*: what `xtrain plan` says.
- *speed*, *memory*: as a share of the plain loop's; on the ladder, of the first rung's.
- The vocabulary is padded to 50,304. The data is a formula (`synthetic`), the same on every machine.
"""


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f}"


def _seconds(value: float) -> str:
    return f"{value:.2f}"


COLUMNS: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "tokens_per_second": ("tokens/s", _count),
    "speed_share": ("speed", _share),
    "mfu": ("MFU", _percent),
    "peak_bytes": ("peak, GiB", _gibibytes),
    "memory_share": ("memory", _share),
    "planned_bytes": ("planned, GiB", _gibibytes),
    "loss_first": ("first loss", "{:.4f}".format),
    "loss_last": ("last loss", "{:.4f}".format),
    "pause_seconds": ("pause, s", _seconds),
    "torch_save_seconds": ("torch.save, s", _seconds),
    "passed": ("passed", _count),
    "failed": ("failed", _count),
    "error": ("errors", _count),
    "skipped": ("skipped", _count),
    "step_seconds": ("a step, s", "{:.4f}".format),
    "busy": ("device busy", _percent),
    "process_seconds": ("whole process, s", _count),
}
"""Figure -> heading and form, in the order of a table."""


KERNELS_SHOWN = 15


def markdown(report: Mapping[str, Any], about: Mapping[str, str], rows: Sequence[Row]) -> str:
    """`about` says of each part what it is."""
    machine = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    lines = [
        f"# On a GPU, {report['date']}",
        "",
        METHOD,
        f"- Device: {report['device']}; {machine['cpu']}, {machine['platform']}",
        f"- Versions: Python {machine['python']}, {versions}; commit {machine['git_commit']}",
        f"- Command: `{report['command']}`; {report['seconds']:.0f} s",
    ]
    for part, text in about.items():
        own = [row for row in rows if row.part == part]
        if own:
            lines += ["", f"## {text[:1].upper()}{text[1:]}", "", *_table(own), *_kernels(own)]
    accuracy = list(_plan_accuracy(rows))
    if accuracy:
        lines += ["", "## Planned and measured", "", *accuracy]
    return "\n".join(lines) + "\n"


def told(row: Row) -> str:
    """A row on one line, for who looks on."""
    used = [key for key in COLUMNS if row.figures.get(key) is not None]
    figures = [f"{COLUMNS[key][0]} {_cell(row, key)}" for key in used]
    return f"{row.part}, {row.name}: {'; '.join([row.outcome, *figures])}"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Only with the columns that some row has a figure for."""
    used = [key for key in COLUMNS if any(row.figures.get(key) is not None for row in rows)]
    yield _line(["lane", *(COLUMNS[key][0] for key in used), "outcome"])
    yield _line(["---", *["---:"] * len(used), "---"])
    for row in rows:
        yield _line([row.name, *(_cell(row, key) for key in used), row.outcome.replace("|", "/")])


def _kernels(rows: Sequence[Row]) -> Iterator[str]:
    """The longest ones of rows that were profiled; the JSON has more."""
    for row in rows:
        if kernels := row.figures.get("kernels"):
            yield from ("", _line(["kernel", "calls a step", "ms a step"]), _line(["---", "---:", "---:"]))
            for name, calls, milliseconds in kernels[:KERNELS_SHOWN]:
                yield _line([f"`{name.replace('|', '/')}`", f"{calls:g}", f"{milliseconds:.2f}"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Row, key: str) -> str:
    value = row.figures.get(key)
    return "-" if value is None else COLUMNS[key][1](value)


def _plan_accuracy(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        planned, measured = row.figures.get("planned_bytes"), row.figures.get("peak_bytes")
        if planned and measured and row.part != "deepspeed":
            yield f"- {row.part}, {row.name}: {planned / measured - 1:+.1%}"
