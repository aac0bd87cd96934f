"""The table at the end of a run, made from its record alone; and how figures are printed anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from tabulate import tabulate

from xtrain.measure.flops import field_speed
from xtrain.measure.speed import PHASE_NAMES, PHASES, Speed, TimeSplit, imbalance
from xtrain.records.record import CounterFacts, Predicted, RankBusy, RankMemory, RunRecord, prediction

NOT_MEASURED = "not measured"

COUNTERS = {
    "live": "live tensors",
    "reserved": "reserved by the allocator",
    "rss": "resident set of the process",
}
"""The counters of RankMemory, as people read them."""


def render_summary(record: RunRecord, directory: Path) -> str:
    """A few rows for people. `directory` is where the run lies."""
    rows = [
        ("run", _outcome(record)),
        ("model", f"{clean(record.model.description)}, {record.model.parameters:,} parameters"),
        ("loss", _loss(record)),
        *([("held-out loss", _evaluation(record))] if record.eval else []),
        ("speed", format_speed(record.speed)),
        *_utilisation(record),
        *(("memory, " + name, _memory(record.memory, key)) for key, name in COUNTERS.items()),
        *_step_peaks(record),
        *_save_copy(record),
        ("time", _time(record.time_split)),
        *_imbalance(record),
        *_busy(record),
        ("everything in", str(directory)),
    ]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)


def format_bytes(count: int | None) -> str:
    if count is None:
        return NOT_MEASURED
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def format_categories(held: Mapping[str, int]) -> str:
    """The total, then what it is made of; less than a thousandth of it is left out."""
    total = sum(held.values())
    shown = {name: count for name, count in held.items() if 1000 * count > total}
    parts = ", ".join(f"{clean(name)} {format_bytes(count)}" for name, count in shown.items())
    return f"{format_bytes(total)}{f': {parts}' if parts else ''}"


def format_loss(loss: float | None) -> str:
    """Of a step that was taken: a record has null where the loss was NaN or infinite."""
    return "not finite" if loss is None else f"{loss:.4f}"


def format_rate(speed: Speed | None) -> str:
    """The median and its spread alone."""
    if speed is None:
        return NOT_MEASURED
    return f"{speed.tokens_per_second:,.0f} ({speed.p10:,.0f} to {speed.p90:,.0f})"


def format_speed(speed: Speed | None) -> str:
    if speed is None:
        return NOT_MEASURED
    return (
        f"{speed.tokens_per_second:,.0f} tokens/s, median of {plural(speed.samples, 'step')} "
        f"(10% to 90%: {speed.p10:,.0f} to {speed.p90:,.0f}; left out: "
        f"{speed.warmup_steps_left_out} for warm-up, {speed.traced_steps_left_out} traced)"
    )


def format_counter(counter: CounterFacts | None) -> str:
    """Peak first, with how it was got; `now` where there is no peak."""
    if counter is None:
        return NOT_MEASURED
    if counter.peak_bytes is None:
        return f"{format_bytes(counter.bytes)} at the end, peak {NOT_MEASURED}"
    return f"peak {format_bytes(counter.peak_bytes)} ({counter.method})"


def largest(ranks: Sequence[RankMemory], key: str) -> CounterFacts | None:
    """The counter `key` of the rank that holds the most, by peak where there is one; None if none has it."""
    found: list[CounterFacts] = [c for r in ranks if (c := getattr(r, key)) is not None]
    return max(found, key=lambda c: (c.peak_bytes or 0, c.bytes), default=None)


def fullest_step(ranks: Sequence[RankMemory]) -> dict[str, dict[str, int]]:
    """A step's bytes by place and category, each place's of the rank that held most there."""
    fullest: dict[str, dict[str, int]] = {}
    for rank in ranks:
        for place, held in (rank.step_peaks.peaks if rank.step_peaks else {}).items():
            fullest[place] = max(fullest.get(place, {}), held, key=lambda one: sum(one.values()))
    return fullest


def has_optimizer_state(ranks: Sequence[RankMemory]) -> bool:
    """Whether the steps of `fullest_step` are like those that are predicted: no run's first update."""
    return all(rank.step_peaks.step > 1 for rank in ranks if rank.step_peaks)


def predicted_at(place: str, predicted: Predicted | None) -> Mapping[str, int] | None:
    """By category; all processes are alike, so another one's device of the same kind will do."""
    peaks = (predicted.peak_bytes if predicted else None) or {}
    alike = (held for other, held in peaks.items() if other.partition(":")[0] == place.partition(":")[0])
    return peaks.get(place) or next(alike, None)


def format_prediction(predicted: Mapping[str, int], measured_bytes: int) -> str:
    """The total with its error, then what it is made of."""
    total, _, parts = format_categories(predicted).partition(":")
    error = f" ({format_error(sum(predicted.values()), measured_bytes)})" if measured_bytes else ""
    return f"{total}{error}{f':{parts}' if parts else ''}"


def format_error(predicted_bytes: int, measured_bytes: int) -> str:
    """Of a prediction; nothing, however little below, is +0.0%."""
    return f"{round(predicted_bytes / measured_bytes - 1, 3) + 0.0:+.1%}"


def plural(count: int, noun: str) -> str:
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def clean(text: str) -> str:
    """Text from a record on one line, without what could steer a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _outcome(record: RunRecord) -> str:
    steps = plural(record.totals.steps, "step")
    skipped = f" ({record.totals.skipped:,} skipped)" if record.totals.skipped else ""
    place = f"{clean(record.backend)}, {plural(record.world, 'process')}"
    reason = record.failure.partition("\n")[0] if record.failure else ""  # the error says the rest
    failure = f": {clean(reason)}" if reason else ""
    return f"{record.status} after {steps}{skipped} on {place}{failure}"


def _loss(record: RunRecord) -> str:
    if not record.totals.steps:
        return NOT_MEASURED
    loss = record.loss
    return f"{format_loss(loss.first)} -> {format_loss(loss.last)} (lowest {format_loss(loss.min)})"


def _evaluation(record: RunRecord) -> str:
    if record.eval is None:
        return NOT_MEASURED
    found = record.eval
    lowest = f" (lowest {found.min:.4f} at step {found.min_step:,})" if found.min < found.last else ""
    return f"{found.last:.4f} at step {found.last_step:,}{lowest}"


def _utilisation(record: RunRecord) -> list[tuple[str, str]]:
    """Where the device's matrix product was measured: the model's operations beside it."""
    if record.speed is None or record.matmul is None:
        return []
    found = field_speed(record, record.speed.tokens_per_second)
    samples = f"{found.samples_per_second:,.1f} samples/s, " if found.samples_per_second else ""
    model, peak = (found.flops_per_second or 0.0) / 1e12, record.matmul.flops_per_second / 1e12
    reached = f"{model:.3g} TFLOP/s of the model, {found.utilisation or 0.0:.0%} of the {peak:.3g} that a"
    return [("", f"{samples}{reached} {clean(record.matmul.dtype)} matrix product reaches (MFU)")]


def _memory(ranks: Sequence[RankMemory], key: str) -> str:
    counter = largest(ranks, key)
    several = f", the largest of {len(ranks)} ranks" if counter is not None and len(ranks) > 1 else ""
    return format_counter(counter) + several


def _step_peaks(record: RunRecord) -> list[tuple[str, str]]:
    """Of each place what a step held, and below it what was predicted; its error where they are alike."""
    rows, predicted = [], prediction(record)
    alike = has_optimizer_state(record.memory)
    for place, held in fullest_step(record.memory).items():
        rows.append((f"memory, a step on {clean(place)}", format_categories(held)))
        if said := predicted_at(place, predicted):
            rows.append(("memory, as predicted", format_prediction(said, sum(held.values()) if alike else 0)))
    if predicted is not None and predicted.peak_bytes is None:
        rows.append(("memory, as predicted", f"not predicted: {clean(predicted.reason or '')}"))
    return rows


def _save_copy(record: RunRecord) -> list[tuple[str, str]]:
    """What saves in the background keep on the rank that keeps most, and what was predicted of it."""
    kept = max((rank.save_copy_bytes or 0 for rank in record.memory), default=0)
    predicted = prediction(record)
    if not kept:
        return []
    said = predicted.save_copy_bytes if predicted else 0
    told = f", predicted {format_bytes(said)} ({said / kept - 1:+.1%})" if said else ""
    return [("memory, a copy for saves", f"{format_bytes(kept)} on the host{told}")]


def _imbalance(record: RunRecord) -> list[tuple[str, str]]:
    found = imbalance(record.rank_seconds or [])
    return [] if found is None else [("", f"the slowest of {record.world} ranks: {format_imbalance(found)}")]


def _busy(record: RunRecord) -> list[tuple[str, str]]:
    device, cores = busy_together(record.busy or [])
    if cores is None:
        return []
    told = f"device {device:.0%} of the time; " if device is not None else ""
    return [("busy", f"{told}{format_cores(cores)}")]


def busy_together(ranks: Sequence[RankBusy]) -> tuple[float | None, float | None]:
    """(mean share of the devices, cores of the host in all); None where a rank does not know."""
    devices = [rank.device for rank in ranks if rank.device is not None]
    cores = [rank.host_cores for rank in ranks if rank.host_cores is not None]
    return (
        fmean(devices) if ranks and len(devices) == len(ranks) else None,
        sum(cores) if ranks and len(cores) == len(ranks) else None,
    )


def format_cores(cores: float) -> str:
    return f"{cores:.1f} of the host's cores"


def format_imbalance(found: float) -> str:
    return f"forward {found:.1%} longer than the mean"


def _time(split: TimeSplit | None) -> str:
    if split is None:
        return NOT_MEASURED
    known = [phase for phase in PHASES if phase in split.shares]
    shares = ", ".join(f"{PHASE_NAMES.get(phase, phase)} {split.shares[phase]:.0%}" for phase in known)
    return f"{shares} ({plural(split.traced_steps, 'traced step')})"
