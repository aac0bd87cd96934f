"""Do the losses agree? In words."""

from __future__ import annotations

from collections.abc import Sequence

from xtrain.report.agreement import Departure, Difference
from xtrain.report.comparison import Figures, Verdict
from xtrain.report.phrases import listed, verdict
from xtrain.report.unlike import has_dropout

Lanes = Sequence[tuple[str, Figures]]


def losses_verdict(lanes: Lanes) -> Verdict | None:
    if not lanes or (len(lanes) < 2 and not disagrees(lanes[0][1])):
        return None
    reference, expected = lanes[0]
    details = _departures(reference, expected, "its first run's") if disagrees(expected) else []
    details += [text for name, figures in lanes[1:] for text in _agreement_of(name, figures, reference)]
    details += [
        f"{name}: its own repeats differ by at most {figures.repeat_difference.relative:.1e}"
        for name, figures in lanes
        if figures.repeat_difference and figures.repeat_difference.relative
    ]
    unlike = [name for name, figures in lanes[1:] if disagrees(figures)]
    if disagrees(expected):
        return verdict("losses", "bad", f"The losses do not agree: {reference}'s own repeats part", details)
    if unlike:
        left = f"{listed(unlike)} left {reference}"
        return verdict("losses", "bad", f"The losses do not agree: {left}", details)
    if any(figures.agreement is None for _, figures in lanes[1:]):
        return verdict("losses", "plain", "Whether the losses agree cannot be told for every lane", details)
    return verdict("losses", "good", "The losses agree", details)


def disagrees(figures: Figures) -> bool:
    """In any of its repeats with the reference; of the reference, with its own first run."""
    found = figures.agreement
    return found is not None and (found.loss is not None or found.lr is not None)


def _agreement_of(name: str, figures: Figures, reference: str) -> list[str]:
    largest = figures.loss_difference
    if figures.agreement is None or largest is None:
        return [f"{name}: cannot be held against {reference}: {_why_unknown(figures)}"]
    if disagrees(figures):
        return _departures(name, figures, f"{reference}'s")
    if not largest.relative:
        return [f"{name}: equal to {reference} at every step"]
    return [f"{name}: as {reference}, within rounding: {_widest(largest)}"]


def _departures(name: str, figures: Figures, expected: str) -> list[str]:
    """Of a lane that disagrees. `expected` is whose loss it should have had."""
    found, details = figures.agreement, []
    if found and found.lr:
        rate = f"its learning rate is another one from {_departure(found.lr)}{_change(found.lr)}"
        details.append(f"{name}: {rate}{_where(found.lr, figures)}")
    if found and found.loss:
        largest = figures.loss_difference or figures.repeat_difference
        far = f"; {_widest(largest)}" if largest else ""
        leaves = f"its loss leaves {expected} at {_departure(found.loss)}"
        details.append(f"{name}: {leaves}{_where(found.loss, figures)}{far}")
    return details


def _widest(largest: Difference) -> str:
    return f"the largest difference is {largest.relative:.1e}, at step {largest.step:,}"


def _where(found: Departure, figures: Figures) -> str:
    return f" (repeat {found.repeat} of {figures.repeats})" if figures.repeats > 1 else ""


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
