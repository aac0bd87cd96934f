"""What the figures mean, in words: pure functions, so that the same figures give the same verdict."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from xtrain.records.summary import NOT_MEASURED, format_bytes, format_imbalance, plural
from xtrain.report.comparison import Figures, LaneReport, Verdict
from xtrain.report.losses import disagrees, losses_verdict
from xtrain.report.memory import instruments
from xtrain.report.noise import SINGLE_RUN_NOISE, SpeedDifference, compare_speeds, median_error
from xtrain.report.phrases import either, listed, verdict

Lanes = Sequence[tuple[str, Figures]]

WAITING_SHARES = {
    "data": (0.20, "waits for data", "cache the tokens, or read them from a faster drive"),
    "reduce": (
        0.25,
        "communicates, or waits for the other processes",
        "larger global batches, or fewer processes",
    ),
    "optimizer": (
        0.30,
        "is held up by the optimizer",
        "larger batches update less often",
    ),
    "other": (0.30, "spends its time between the phases", "steps may be too short: try a larger batch.micro"),
}
"""By phase: from what share of a step on it is the bottleneck, in words, and what to try."""
GOOD_UTILISATION = 0.40
GREAT_NOISE = 0.10
GREAT_IMBALANCE = 0.15
MOST_LISTED = 4
LITTLE_MEMORY = 0.02
"""Relative; a smaller difference of two peaks decides nothing."""


def verdicts(lanes: Lanes, unfinished: Sequence[LaneReport]) -> list[Verdict]:
    """Losses first: a faster lane that learns something else is not faster."""
    found = [
        losses_verdict(lanes),
        speed_verdict(lanes),
        memory_verdict(lanes),
        bottleneck_verdict(lanes),
        choice_verdict(lanes, unfinished),
    ]
    return [one for one in found if one is not None]


# --- which is faster? ---------------------------------------------------------------------------


def speed_verdict(lanes: Lanes) -> Verdict | None:
    timed = [(name, figures) for name, figures in lanes if figures.speed]
    if len(timed) < 2:
        return None
    timed.sort(key=lambda lane: -_mean_rate(lane[1]))
    best, best_figures = timed[0]
    held = [(name, speed_difference(figures, best_figures, len(timed))) for name, figures in timed[1:]]
    details = [_slower(name, best, difference) for name, difference in held]
    if any(len(figures.repeat_rates) < 2 for _, figures in timed):
        details.append(
            f"Lanes that ran once: differences below {SINGLE_RUN_NOISE:.0%} are not believed; use --repeats 3"
        )
    equals = [name for name, difference in held if difference.is_noise]
    rate = f"{_rate(best_figures):,.0f} tokens/s"
    if len(equals) == len(held):
        return verdict("speed", "plain", f"No lane is faster beyond noise ({best}: {rate})", details)
    beside = f", {plural(len(equals), 'lane')} within noise of it" if equals else ""
    return verdict("speed", "good", f"{best} is the fastest: {rate}{beside}", details)


def speed_difference(figures: Figures, other: Figures, lanes: int) -> SpeedDifference:
    """Of two of the `lanes` that were timed."""
    unrest = max(_unrest(figures), _unrest(other))
    return compare_speeds(figures.repeat_rates, other.repeat_rates, unrest, lanes)


def _unrest(figures: Figures) -> float:
    speed = figures.speed
    return median_error(speed.p10, speed.tokens_per_second, speed.p90, speed.samples) if speed else 0.0


def _rate(figures: Figures) -> float:
    """As tables show it: of the repeat in the middle."""
    return figures.speed.tokens_per_second if figures.speed else 0.0


def _mean_rate(figures: Figures) -> float:
    """What SpeedDifference holds against another's: lanes are put in order by this."""
    return geometric_mean(figures.repeat_rates) if figures.repeat_rates else 0.0


def _slower(name: str, best: str, found: SpeedDifference) -> str:
    noise = f"noise {found.noise_below if found.ratio < 1 else found.noise:.1%}"
    if found.is_noise:
        more = "; more repeats would tell" if found.noise > GREAT_NOISE else ""
        return f"{name} and {best}: {abs(1 - found.ratio):.1%} apart, within noise ({noise}){more}"
    return f"{name} is {1 - found.ratio:.1%} slower than {best} ({noise})"


# --- which needs less memory? -------------------------------------------------------------------


def memory_verdict(lanes: Lanes) -> Verdict | None:
    """By each instrument that at least two lanes share; the headline is by the first."""
    shared = [(name, held) for name, held in instruments(lanes).items() if len(held) > 1]
    if not shared:
        return None if len(lanes) < 2 else verdict("memory", "plain", "No two lanes counted memory alike", [])
    details = [_memory_by(name, held) for name, held in shared]
    least = _leanest(shared[0][1])
    if len(least) == len(shared[0][1]):
        return verdict("memory", "plain", "All lanes need the same memory", details)
    need = "needs" if len(least) == 1 else "need"
    return verdict("memory", "good", f"{listed(least)} {need} the least memory", details)


def _leanest(held: dict[str, int]) -> list[str]:
    """Those that need least, or hardly more, in order."""
    bound = min(held.values()) * (1 + LITTLE_MEMORY)
    return [name for name in sorted(held, key=lambda name: held[name]) if held[name] <= bound]


def _memory_by(instrument: str, held: dict[str, int]) -> str:
    """From the leanest on; of many, those in between are counted."""
    least, *others = sorted(held, key=lambda name: held[name])
    parts = [f"{name} {format_bytes(held[name])}{_more(held[name], held[least])}" for name in others]
    if len(parts) > MOST_LISTED:
        parts = [*parts[: MOST_LISTED - 1], f"{len(parts) - MOST_LISTED} between", parts[-1]]
    return f"{instrument}: {', '.join([f'{least} {format_bytes(held[least])}', *parts])}"


def _more(count: int, least: int) -> str:
    """Than the least: in percent, in multiples from ten on."""
    if not least:
        return ""
    return f" (+{count / least - 1:.0%})" if count < 10 * least else f" ({count / least:,.0f} times)"


# --- what holds each lane up? -------------------------------------------------------------------


def bottleneck_verdict(lanes: Lanes) -> Verdict | None:
    if all(figures.time_split is None for _, figures in lanes):
        return None
    found = {name: _bottleneck(figures) for name, figures in lanes}
    details = [f"{name} {text}{f': {advice}' if advice else ''}" for name, (text, advice) in found.items()]
    details += [
        f"{name}: its ranks are unequal: the slowest has its {format_imbalance(figures.imbalance)}"
        for name, figures in lanes
        if figures.imbalance is not None and figures.imbalance >= GREAT_IMBALANCE
    ]
    return verdict("bottleneck", "plain", "What holds each lane up", details)


def _bottleneck(figures: Figures) -> tuple[str, str]:
    """(what it does, what to try)."""
    split = figures.time_split
    if split is None:
        return f"was {NOT_MEASURED} by phase", ""
    over = {
        phase: split.shares.get(phase, 0.0) / limit
        for phase, (limit, _, _) in WAITING_SHARES.items()
        if split.shares.get(phase, 0.0) >= limit
    }
    if over:
        phase = max(over, key=lambda one: over[one])
        _, text, advice = WAITING_SHARES[phase]
        return f"{text} ({split.shares[phase]:.0%} of a step)", advice
    computing = split.shares.get("forward", 0.0) + split.shares.get("backward", 0.0)
    text = f"computes: forward and backward are {computing:.0%} of a step"
    use = figures.field_speed.utilisation if figures.field_speed else None
    if use is None:
        return text, ""
    advice = (
        ""
        if use >= GOOD_UTILISATION
        else "the products are small, or memory is slow: try a larger batch.micro"
    )
    return f"{text}, at {use:.0%} of what a matrix product reaches here", advice


# --- when to choose which? ----------------------------------------------------------------------


def choice_verdict(lanes: Lanes, unfinished: Sequence[LaneReport]) -> Verdict | None:
    if not lanes or len(lanes) + len(unfinished) < 2:
        return None
    details = [f"Not {lane.name}: {_first_words(lane)}" for lane in unfinished]
    wrong = [name for name, figures in lanes[1:] if disagrees(figures)]
    if disagrees(lanes[0][1]):
        first = f"First find out why {lanes[0][0]} does not learn the same twice"
        return verdict("choice", "bad", first, details)
    if wrong:
        first = f"First find out why {listed(wrong)} learned something else than {lanes[0][0]}"
        return verdict("choice", "bad", first, details)
    if len(lanes) == 1:
        return verdict("choice", "plain", f"{lanes[0][0]} is the only one that finished", details)
    fast, lean = _fastest(lanes), _least_memory(lanes)
    return verdict("choice", "good", *_choice(dict(lanes), fast, lean, details))


def _choice(
    lanes: dict[str, Figures], fast: list[str], lean: list[str], details: list[str]
) -> tuple[str, list[str]]:
    """From the lanes that no other is faster than, and those that no other needs less memory than."""
    both = [name for name in fast if name in lean]
    if len(both) == len(lanes):
        return "Nothing measured here speaks for one lane: choose by what you know better", details
    if both:
        return f"Choose {either(both)}: nothing here is faster beyond noise, or needs less memory", details
    if not fast and not lean:
        return "Too little was measured to choose", details
    if not fast or not lean:
        return f"Choose {either(fast or lean)} {'for speed' if fast else 'for memory'}", details
    leanest, fastest = _mean_rate(lanes[lean[0]]), _mean_rate(lanes[fast[0]])
    price = f"costs {1 - leanest / fastest:.0%} of the speed" if leanest else "was not timed"
    choices = [
        f"Choose {either(fast)} where it fits",
        f"Choose {either(lean)} where memory is short: {lean[0]} {price}",
    ]
    return f"{either(fast)} for speed, {either(lean)} for memory", [*choices, *details]


def _fastest(lanes: Lanes) -> list[str]:
    timed = sorted((lane for lane in lanes if lane[1].speed), key=lambda lane: -_mean_rate(lane[1]))
    return [
        name
        for name, figures in timed
        if figures is timed[0][1] or speed_difference(figures, timed[0][1], len(timed)).is_noise
    ]


def _least_memory(lanes: Lanes) -> list[str]:
    """By the first instrument that all lanes share; empty where there is none."""
    for held in instruments(lanes).values():
        if len(held) == len(lanes):
            return _leanest(held)
    return []


def _first_words(lane: LaneReport) -> str:
    reason = lane.reason or lane.outcome
    return f"it was refused: {reason}" if lane.outcome == "refused" else f"it failed: {reason}"
