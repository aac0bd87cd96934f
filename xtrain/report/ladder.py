"""The ladder of techniques, claimed and measured side by side."""

from __future__ import annotations

from collections.abc import Sequence

from xtrain.report.comparison import Figures, Rung
from xtrain.report.memory import step_bytes
from xtrain.report.unlike import shown
from xtrain.rungs import RUNGS, LadderPlace


def ladder_rungs(lanes: Sequence[tuple[LadderPlace, Figures | None]]) -> list[Rung]:
    """A row for each lane, also for those that did not finish; shares are of the same ladder's first rung."""
    plain = {place.ladder: figures for place, figures in lanes if place.rung == 0}
    return [_rung(place, figures, plain.get(place.ladder)) for place, figures in lanes]


def _rung(place: LadderPlace, figures: Figures | None, plain: Figures | None) -> Rung:
    claimed = RUNGS[place.rung]
    bytes_, plain_bytes = _bytes(figures), _bytes(plain)
    rate, plain_rate = _rate(figures), _rate(plain)
    return Rung(
        lane=shown(place.ladder),
        name=claimed.name,
        claimed_memory=claimed.memory,
        claimed_speed=claimed.speed,
        set_to=_set_to(figures) if figures else "",
        memory_bytes=bytes_,
        memory_share=bytes_ / plain_bytes if bytes_ and plain_bytes else None,
        speed_share=rate / plain_rate if rate and plain_rate else None,
    )


def _set_to(figures: Figures) -> str:
    batch = figures.spec.get("batch")
    micro = batch.get("micro") or batch.get("global") if isinstance(batch, dict) else None
    return f"{figures.precision or 'unknown precision'}, batch.micro {shown(micro)}"


def _bytes(figures: Figures | None) -> int | None:
    return (step_bytes(figures) or None) if figures else None


def _rate(figures: Figures | None) -> float | None:
    return figures.speed.tokens_per_second if figures and figures.speed else None
