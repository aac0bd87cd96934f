"""From the runs of a lane to its figures: pure functions over records and steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Literal

from xtrain.contract import MEMORY_CATEGORIES
from xtrain.measure.flops import field_speed
from xtrain.measure.speed import PHASES, Speed, TimeSplit, imbalance
from xtrain.records.metrics import StepRecord
from xtrain.records.record import MatmulFacts, RankMemory, RunRecord, prediction
from xtrain.records.summary import (
    COUNTERS,
    busy_together,
    fullest_step,
    has_optimizer_state,
    largest,
    predicted_at,
)
from xtrain.report.agreement import (
    Agreement,
    Difference,
    agreement_of_repeats,
    largest_difference,
    widest,
)
from xtrain.report.comparison import Curve, Figures
from xtrain.report.fitted import chosen_rung
from xtrain.report.memory import by_importance
from xtrain.report.runs import Run
from xtrain.report.unlike import has_dropout

CURVE_POINTS = 400
"""A page shows no more, and a report of thirty lanes stays small."""
MOST_PLACES = 16
LONGEST_TEXT = 500
"""Characters."""
SMALLEST_RATE, LARGEST_RATE = 1e-9, 1e30
"""Speeds beyond them are no speeds, and their products no numbers."""


def figures_of(runs: Sequence[Run], reference: Sequence[Run]) -> Figures:
    """Of one lane, held against the first run of the reference lane. Both have at least one run."""
    first, expected = runs[0], reference[0]
    record, is_reference = first.record, runs is reference
    memory = [rank for run in runs for rank in run.record.memory]
    speeds = [speed for run in runs if (speed := sound_speed(run.record.speed))]
    middle = sorted(speeds, key=lambda speed: speed.tokens_per_second)[(len(speeds) - 1) // 2 :][:1]
    peaks = _step_peaks(memory)
    busy = [busy_together(run.record.busy or []) for run in runs]
    figures = Figures(
        backend=short(record.backend),
        world=record.world,
        repeats=len(runs),
        status=record.status,
        precision=_short(_precision(record)),
        rung=chosen_rung(record),
        threads=record.threads,
        matmul_precision=_short(record.matmul_precision),
        data_hash=_short(record.data.hash),
        parameters=record.model.parameters,
        steps=record.totals.steps,
        skipped=record.totals.skipped,
        environment=record.environment,
        spec=record.spec,
        loss=record.loss,
        eval=record.eval,
        loss_difference=None if is_reference else _difference(runs, expected, "loss"),
        grad_norm_difference=None if is_reference else _difference(runs, expected, "grad_norm"),
        agreement=None,
        repeat_difference=_difference(runs[1:], first, "loss"),
        unmatched_steps=max(len(_with_loss(run) ^ _with_loss(expected)) for run in runs),
        speed=middle[0] if middle else None,
        repeat_rates=[speed.tokens_per_second for speed in speeds],
        field_speed=field_speed(record, middle[0].tokens_per_second) if middle else None,
        matmul=_matmul(record.matmul),
        time_split=_mean_split([run.record.time_split for run in runs if run.record.time_split]),
        imbalance=imbalance(record.rank_seconds or []),
        device_busy=_mean([device for device, _ in busy]),
        host_cores=_mean([cores for _, cores in busy]),
        live=largest(memory, "live"),
        reserved=largest(memory, "reserved"),
        rss=largest(memory, "rss"),
        step_peaks=peaks,
        predicted=_predicted(record, list(peaks)),
        loss_curve=_curve(first.steps, lambda step: step.loss),
        memory_curves=_memory_curves(first.steps),
    )
    difference = figures.repeat_difference if is_reference else figures.loss_difference
    return figures.model_copy(update={"agreement": _agreement(figures, runs, expected, difference)})


def short(text: str) -> str:
    """Text from a record, which may be of any length."""
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]}..."


def _short(text: str | None) -> str | None:
    return short(text) if text else text


def sound_speed(speed: Speed | None) -> Speed | None:
    """A speed from a record, if it is one."""
    if speed is None:
        return None
    rates = (speed.tokens_per_second, speed.p10, speed.p90)
    return speed if all(SMALLEST_RATE < rate < LARGEST_RATE for rate in rates) else None


def _matmul(found: MatmulFacts | None) -> MatmulFacts | None:
    return found.model_copy(update={"dtype": short(found.dtype)}) if found else None


def _predicted(record: RunRecord, places: Sequence[str]) -> dict[str, dict[str, int]]:
    """By place and category; without those where nothing was predicted that can be held against a step."""
    said = prediction(record) if has_optimizer_state(record.memory) else None
    found = {place: _categories(predicted_at(place, said)) for place in places}
    return {place: held for place, held in found.items() if held}


def _categories(held: Any) -> dict[str, int]:
    if not isinstance(held, dict):
        return {}
    counts = {name: held.get(name) for name in MEMORY_CATEGORIES}
    return {name: n for name, n in counts.items() if isinstance(n, int) and 0 <= n < 1 << 63}


def _agreement(
    figures: Figures, runs: Sequence[Run], reference: Run, difference: Difference | None
) -> Agreement | None:
    """None where curves cannot be held against each other: other data, dropout, no step in common."""
    data = {one.record.data.hash for one in (*runs, reference)}
    if difference is None or len(data) > 1 or None in data or has_dropout(figures):
        return None
    repeats = enumerate((run.steps for run in runs), start=1)
    return agreement_of_repeats(repeats, reference.steps, _coarser(runs[0].record, reference.record))


def _coarser(record: RunRecord, other: RunRecord) -> str:
    """Of two records' dtypes."""
    order = ("fp32", "fp16", "bf16")
    dtypes = [_dtype(one) for one in (record, other)]
    return max(dtypes, key=lambda dtype: order.index(dtype) if dtype in order else len(order))


def _dtype(record: RunRecord) -> str:
    section = record.spec.get("precision")
    return str(section.get("dtype")) if isinstance(section, dict) else "unknown"


def _precision(record: RunRecord) -> str | None:
    section = record.spec.get("precision")
    if not isinstance(section, dict):
        return None
    dtype, weights = section.get("dtype"), section.get("weights")
    return f"{dtype}" if dtype == weights else f"{dtype} over {weights} weights"


def _with_loss(run: Run) -> set[int]:
    return {step.step for step in run.steps if step.loss is not None}


def _difference(runs: Sequence[Run], reference: Run, key: Literal["loss", "grad_norm"]) -> Difference | None:
    """The largest in any of `runs`."""
    return widest(largest_difference(run.steps, reference.steps, key) for run in runs)


def _mean_split(splits: Sequence[TimeSplit]) -> TimeSplit | None:
    """Over the repeats; phases that we know, seconds that can be."""
    sound = [split for split in splits if _is_sound(split)]
    if not sound:
        return None
    phases = [phase for phase in PHASES if any(phase in split.seconds for split in sound)]
    seconds = {phase: fmean(split.seconds.get(phase, 0.0) for split in sound) for phase in phases}
    total = sum(seconds.values())
    if not total:
        return None
    return TimeSplit(
        seconds=seconds,
        shares={phase: value / total for phase, value in seconds.items()},
        traced_steps=sum(split.traced_steps for split in sound),
    )


def _is_sound(split: TimeSplit) -> bool:
    return all(math.isfinite(value) and 0 <= value < LARGEST_RATE for value in split.seconds.values())


def _step_peaks(memory: Sequence[RankMemory]) -> dict[str, dict[str, int]]:
    """By importance, and only categories that are ones."""
    peaks = by_importance({place: _categories(held) for place, held in fullest_step(memory).items()})
    return dict([*peaks.items()][:MOST_PLACES])


def _memory_curves(steps: Sequence[StepRecord]) -> dict[str, Curve]:
    keys = {"live": "live_bytes", "reserved": "reserved_bytes", "rss": "rss_bytes"}
    curves = {key: _curve(steps, lambda step, key=key: getattr(step, keys[key])) for key in COUNTERS}  # type: ignore[misc]
    return {key: curve for key, curve in curves.items() if curve.steps}


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if known and len(known) == len(values) else None


def _curve(steps: Sequence[StepRecord], value: Callable[[StepRecord], float | None]) -> Curve:
    """At most CURVE_POINTS points at equal distances, the first and the last among them."""
    points = [(step.step, float(found)) for step in steps if (found := value(step)) is not None]
    if len(points) > CURVE_POINTS:
        last = len(points) - 1
        points = [points[round(i * last / (CURVE_POINTS - 1))] for i in range(CURVE_POINTS)]
    return Curve(steps=[step for step, _ in points], values=[found for _, found in points])
