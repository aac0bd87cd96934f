"""A comparison as tables of text: the same ones on the terminal, in Markdown and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xtrain.contract import MEMORY_CATEGORIES
from xtrain.measure.speed import PHASE_NAMES, PHASES, TimeSplit
from xtrain.records.summary import (
    COUNTERS,
    NOT_MEASURED,
    format_bytes,
    format_error,
    format_imbalance,
    format_loss,
    format_rate,
)
from xtrain.report.agreement import Difference
from xtrain.report.comparison import Comparison, Figures, Rung

Lanes = Sequence[tuple[str, Figures]]


@dataclass(frozen=True)
class Table:
    title: str
    headers: list[str]
    rows: list[list[str]]


def tables(comparison: Comparison) -> list[Table]:
    """Those that have something to say."""
    lanes = comparison.finished
    found = [
        _ladder(comparison),
        _losses(lanes, comparison.reference),
        _speed(lanes),
        _field_speed(lanes),
        _time(lanes),
        _busy(lanes),
        _memory(lanes),
        _step_memory(lanes),
        _predicted(lanes),
        _unfinished(comparison),
    ]
    return [table for table in found if table.rows]


def _ladder(comparison: Comparison) -> Table:
    headers = [
        "lane",
        "rung",
        "set here",
        "memory, claimed",
        "memory, measured",
        "speed, claimed",
        "measured",
    ]
    before = [None, *comparison.ladder]
    rows = [
        [
            rung.lane,
            rung.name,
            rung.set_to,
            rung.claimed_memory,
            f"{format_bytes(rung.memory_bytes)}{_percent(rung.memory_share, ' ({})')}{_unmoved(above, rung)}",
            rung.claimed_speed,
            _percent(rung.speed_share, "{}") or NOT_MEASURED,
        ]
        for above, rung in zip(before, comparison.ladder, strict=False)
    ]
    return Table("The ladder, claimed for GPT-2 Large and measured here", headers, rows)


def _unmoved(above: Rung | None, rung: Rung) -> str:
    """Where a technique changed nothing of a lane's memory; the run's notes say why."""
    if above is None or above.lane != rung.lane or rung.memory_bytes is None:
        return ""
    return ", as above" if above.memory_bytes == rung.memory_bytes else ""


def _losses(lanes: Lanes, reference: str | None) -> Table:
    def difference(name: str, found: Difference | None) -> str:
        if name == reference:
            return "reference"
        if found is None:
            return NOT_MEASURED
        return f"{found.relative:.1e} at step {found.step:,}" if found.relative else "none"

    headers = ["lane", "steps", "loss first", "loss last", "held-out loss"]
    headers += ["largest loss difference", "largest grad norm difference"]
    rows = [
        [
            name,
            f"{figures.steps:,}{'' if figures.status == 'done' else f' ({figures.status})'}",
            format_loss(figures.loss.first),
            format_loss(figures.loss.last),
            f"{figures.eval.last:.4f}" if figures.eval else NOT_MEASURED,
            difference(name, figures.loss_difference),
            difference(name, figures.grad_norm_difference),
        ]
        for name, figures in lanes
    ]
    return Table("Losses", headers, rows)


def _speed(lanes: Lanes) -> Table:
    headers = ["lane", "tokens/s (10% to 90%)", "each repeat", "steps counted"]
    headers += ["processes", "threads", "precision", "matmul"]
    rows = [
        [
            name,
            format_rate(figures.speed),
            ", ".join(f"{rate:,.0f}" for rate in figures.repeat_rates) or NOT_MEASURED,
            NOT_MEASURED if figures.speed is None else f"{figures.speed.samples:,}",
            f"{figures.world}",
            "unknown" if figures.threads is None else f"{figures.threads}",
            figures.precision or "unknown",
            figures.matmul_precision or "unknown",
        ]
        for name, figures in lanes
    ]
    return Table("Speed", headers, rows)


def _field_speed(lanes: Lanes) -> Table:
    headers = [
        "lane",
        "samples/s",
        "model FLOP per token",
        "model TFLOP/s",
        "matmul TFLOP/s",
        "MFU",
        "of data sheet",
    ]
    rows = []
    for name, figures in lanes:
        found, matmul = figures.field_speed, figures.matmul
        if found is None:
            continue
        attention = "" if found.attention_counted else " (attention not counted)"
        peak = f"{matmul.flops_per_second / 1e12:,.3g} ({matmul.dtype})" if matmul else NOT_MEASURED
        rows.append(
            [
                name,
                NOT_MEASURED if found.samples_per_second is None else f"{found.samples_per_second:,.1f}",
                NOT_MEASURED if found.flops_per_token is None else f"{found.flops_per_token:.3g}{attention}",
                NOT_MEASURED if found.flops_per_second is None else f"{found.flops_per_second / 1e12:,.3g}",
                peak,
                _percent(found.utilisation, "{}") or NOT_MEASURED,
                _percent(found.datasheet_utilisation, "{}") or "unknown",
            ]
        )
    return Table("Speed in the field's terms", headers, rows)


def _time(lanes: Lanes) -> Table:
    """Where several processes train, communication has a column, measured or not."""
    timed = [(name, figures, figures.time_split) for name, figures in lanes if figures.time_split]
    several = any(figures.world > 1 for _, figures, _ in timed)
    used = [
        phase
        for phase in PHASES
        if (several and phase == "reduce") or any(phase in split.seconds for _, _, split in timed)
    ]
    rows = [
        [
            name,
            f"{1000 * sum(split.seconds.values()):,.1f} ms",
            *(_phase_share(figures, split, phase) for phase in used),
            *([_slowest(figures)] if several else []),
        ]
        for name, figures, split in timed
    ]
    phases = [PHASE_NAMES.get(phase, phase) for phase in used]
    headers = ["lane", "step", *phases, *(["slowest rank"] if several else [])]
    return Table("Time of a traced step", headers, rows)


def _phase_share(figures: Figures, split: TimeSplit, phase: str) -> str:
    if phase == "reduce" and figures.world == 1 and phase not in split.shares:
        return "one process"
    return _share(split.shares.get(phase))


def _busy(lanes: Lanes) -> Table:
    """A device's own counter and the clock of the host's cores are unlike figures: each has its column."""
    told = any(figures.device_busy is not None for _, figures in lanes)
    rows = [
        [
            name,
            *([_share(figures.device_busy)] if told else []),
            NOT_MEASURED if figures.host_cores is None else f"{figures.host_cores:.1f}",
        ]
        for name, figures in lanes
        if figures.host_cores is not None or figures.device_busy is not None
    ]
    device = ["device busy, as its vendor counts"] if told else []
    return Table("How busy the machine was", ["lane", *device, "host cores busy, all processes"], rows)


def _slowest(figures: Figures) -> str:
    if figures.imbalance is None:
        return "one rank" if figures.world == 1 else NOT_MEASURED
    return format_imbalance(figures.imbalance)


def _memory(lanes: Lanes) -> Table:
    """One column for each way of counting that a lane has: unlike figures never share one."""
    cells = {name: _memory_cells(figures) for name, figures in lanes}
    columns = [
        (key, method) for key in COUNTERS for method in ("peak (counter)", "peak (sampled)", "at the end")
    ]
    used = [column for column in columns if any(column in found for found in cells.values())]
    headers = ["lane", *(f"{COUNTERS[key]}, {method}" for key, method in used)]
    rows = [[name, *(found.get(column, NOT_MEASURED) for column in used)] for name, found in cells.items()]
    return Table("Memory", headers, rows)


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


def _step_memory(lanes: Lanes) -> Table:
    """One row for each lane and place; where nothing was counted there is none."""
    held = [(name, place, one) for name, figures in lanes for place, one in figures.step_peaks.items()]
    used = [name for name in MEMORY_CATEGORIES if any(one.get(name) for _, _, one in held)]
    rows = [
        [name, place, format_bytes(sum(one.values())), *(format_bytes(one.get(key, 0)) for key in used)]
        for name, place, one in held
    ]
    return Table("Memory of one step at its fullest", ["lane", "on", "total", *used], rows)


def _predicted(lanes: Lanes) -> Table:
    """One row for each lane and place that was predicted."""
    rows = []
    for name, figures in lanes:
        for place, held in figures.predicted.items():
            said, measured = sum(held.values()), sum(figures.step_peaks[place].values())
            error = format_error(said, measured) if measured else NOT_MEASURED
            rows.append([name, place, format_bytes(said), format_bytes(measured), error])
    headers = ["lane", "on", "predicted", "measured", "error"]
    return Table("Memory of a step, predicted and measured", headers, rows)


def _unfinished(comparison: Comparison) -> Table:
    rows = [[lane.name, lane.outcome, lane.reason or ""] for lane in comparison.unfinished]
    return Table("Lanes without figures", ["lane", "outcome", "reason"], rows)


def _percent(share: float | None, form: str) -> str:
    return "" if share is None else form.format(f"{share:.0%}")


def _share(share: float | None) -> str:
    return NOT_MEASURED if share is None else f"{share:.0%}"
