"""What the figures mean, in words: pure functions, so that the same figures give the same verdict."""

from __future__ import annotations

from collections.abc import Sequence

from xtrain.records.summary import NOT_MEASURED, format_bytes, format_imbalance, plural
from xtrain.report.agreement import Departure
from xtrain.report.comparison import Figures, LaneReport, Tone, Topic, Verdict
from xtrain.report.memory import instruments
from xtrain.report.noise import SINGLE_RUN_NOISE, SpeedDifference, compare_speeds, median_error
from xtrain.report.unlike import has_dropout

Lanes = Sequence[tuple[str, Figures]]

WAITING_SHARES = {
    "data": (0.20, "waits for data", "cache the tokens, or read them from a faster drive"),
    "reduce": (0.25, "waits for the other processes", "larger global batches, or fewer processes"),
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
    return [verdict for verdict in found if verdict is not None]


# --- do the losses agree? -----------------------------------------------------------------------


def losses_verdict(lanes: Lanes) -> Verdict | None:
    if len(lanes) < 2:
        return None
    reference, _ = lanes[0]
    details = [text for name, figures in lanes[1:] for text in _agreement_of(name, figures, reference)]
    details += [
        f"{name}: its own repeats differ by at most {figures.repeat_difference.relative:.1e}"
        for name, figures in lanes
        if figures.repeat_difference and figures.repeat_difference.relative
    ]
    unlike = [name for name, figures in lanes[1:] if disagrees(figures)]
    unknown = [name for name, figures in lanes[1:] if figures.agreement is None]
    if unlike:
        return _verdict(
            "losses", "bad", f"The losses do not agree: {_listed(unlike)} left {reference}", details
        )
    if unknown:
        return _verdict("losses", "plain", "Whether the losses agree cannot be told for every lane", details)
    return _verdict("losses", "good", "The losses agree", details)


def disagrees(figures: Figures) -> bool:
    found = figures.agreement
    return found is not None and (found.loss is not None or found.lr is not None)


def _agreement_of(name: str, figures: Figures, reference: str) -> list[str]:
    found, largest = figures.agreement, figures.loss_difference
    if found is None or largest is None:
        return [f"{name}: cannot be held against {reference}: {_why_unknown(figures)}"]
    widest = f"the largest difference is {largest.relative:.1e}, at step {largest.step:,}"
    details = []
    if found.lr:
        details.append(
            f"{name}: its learning rate is another one from {_departure(found.lr)}{_change(found.lr)}"
        )
    if found.loss:
        details.append(f"{name}: its loss leaves {reference}'s at {_departure(found.loss)}; {widest}")
    if details:
        return details
    if not largest.relative:
        return [f"{name}: equal to {reference} at every step"]
    return [f"{name}: as {reference}, within rounding: {widest}"]


def _departure(found: Departure) -> str:
    value, reference = (
        "no number" if number is None else f"{number:.7g}" for number in (found.value, found.reference)
    )
    return f"step {found.step:,}: {value} instead of {reference}"


def _change(found: Departure) -> str:
    if found.value is None or not found.reference:
        return ""
    return f" ({found.value / found.reference - 1:+.2%})"


def _why_unknown(figures: Figures) -> str:
    if has_dropout(figures):
        return "dropout is on"
    return "no step in common" if figures.loss_difference is None else "the data may differ"


# --- which is faster? ---------------------------------------------------------------------------


def speed_verdict(lanes: Lanes) -> Verdict | None:
    timed = [(name, figures) for name, figures in lanes if figures.speed]
    if len(timed) < 2:
        return None
    timed.sort(key=lambda lane: -_rate(lane[1]))
    best, best_figures = timed[0]
    held = [(name, speed_difference(figures, best_figures)) for name, figures in timed[1:]]
    details = [_slower(name, best, difference) for name, difference in held]
    if any(len(figures.repeat_rates) < 2 for _, figures in timed):
        details.append(
            f"Lanes that ran once: differences below {SINGLE_RUN_NOISE:.0%} are not believed; use --repeats 3"
        )
    equals = [name for name, difference in held if difference.is_noise]
    rate = f"{_rate(best_figures):,.0f} tokens/s"
    if len(equals) == len(held):
        return _verdict("speed", "plain", f"No lane is faster beyond noise ({best}: {rate})", details)
    beside = f", {plural(len(equals), 'lane')} within noise of it" if equals else ""
    return _verdict("speed", "good", f"{best} is the fastest: {rate}{beside}", details)


def speed_difference(figures: Figures, other: Figures) -> SpeedDifference:
    """Both timed."""
    unrest = max(_unrest(figures), _unrest(other))
    return compare_speeds(figures.repeat_rates, other.repeat_rates, unrest)


def _unrest(figures: Figures) -> float:
    speed = figures.speed
    return median_error(speed.p10, speed.tokens_per_second, speed.p90, speed.samples) if speed else 0.0


def _rate(figures: Figures) -> float:
    return figures.speed.tokens_per_second if figures.speed else 0.0


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
        return (
            None if len(lanes) < 2 else _verdict("memory", "plain", "No two lanes counted memory alike", [])
        )
    details = [_memory_by(name, held) for name, held in shared]
    least = _leanest(shared[0][1])
    if len(least) == len(shared[0][1]):
        return _verdict("memory", "plain", "All lanes need the same memory", details)
    need = "needs" if len(least) == 1 else "need"
    return _verdict("memory", "good", f"{_listed(least)} {need} the least memory", details)


def _leanest(held: dict[str, int]) -> list[str]:
    """Those that need least, or hardly more, in order."""
    bound = min(held.values()) * (1 + LITTLE_MEMORY)
    return [name for name in sorted(held, key=lambda name: held[name]) if held[name] <= bound]


def _memory_by(instrument: str, held: dict[str, int]) -> str:
    least = min(held, key=lambda name: held[name])
    parts = [f"{least} {format_bytes(held[least])}"]
    for name in sorted(held, key=lambda name: held[name]):
        if name != least:
            more = f" (+{held[name] / held[least] - 1:.0%})" if held[least] else ""
            parts.append(f"{name} {format_bytes(held[name])}{more}")
    return f"{instrument}: {', '.join(parts)}"


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
    return _verdict("bottleneck", "plain", "What holds each lane up", details)


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
    if wrong:
        first = f"First find out why {_listed(wrong)} learned something else than {lanes[0][0]}"
        return _verdict("choice", "bad", first, details)
    if len(lanes) == 1:
        return _verdict("choice", "plain", f"{lanes[0][0]} is the only one that finished", details)
    fast, lean = _fastest(lanes), _least_memory(lanes)
    return _verdict("choice", "good", *_choice(dict(lanes), fast, lean, details))


def _choice(
    lanes: dict[str, Figures], fast: list[str], lean: list[str], details: list[str]
) -> tuple[str, list[str]]:
    """From the lanes that no other is faster than, and those that no other needs less memory than."""
    both = [name for name in fast if name in lean]
    if len(both) == len(lanes):
        return "Nothing measured here speaks for one lane: choose by what you know better", details
    if both:
        return f"Choose {_or(both)}: nothing here is faster beyond noise, or needs less memory", details
    if not fast and not lean:
        return "Too little was measured to choose", details
    if not fast or not lean:
        return f"Choose {_or(fast or lean)} {'for speed' if fast else 'for memory'}", details
    leanest, fastest = _rate(lanes[lean[0]]), _rate(lanes[fast[0]])
    price = f"costs {1 - leanest / fastest:.0%} of the speed" if leanest else "was not timed"
    either = [
        f"Choose {_or(fast)} where it fits",
        f"Choose {_or(lean)} where memory is short: {lean[0]} {price}",
    ]
    return f"{_or(fast)} for speed, {_or(lean)} for memory", [*either, *details]


def _fastest(lanes: Lanes) -> list[str]:
    timed = sorted((lane for lane in lanes if lane[1].speed), key=lambda lane: -_rate(lane[1]))
    return [
        name
        for name, figures in timed
        if figures is timed[0][1] or speed_difference(figures, timed[0][1]).is_noise
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


def _verdict(topic: Topic, tone: Tone, headline: str, details: Sequence[str]) -> Verdict:
    return Verdict(topic=topic, tone=tone, headline=headline, details=list(details))


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
