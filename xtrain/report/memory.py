"""Memory as reports compare it: unlike counters never meet."""

from __future__ import annotations

from collections.abc import Sequence

from xtrain.records.record import CounterFacts
from xtrain.records.summary import COUNTERS
from xtrain.report.comparison import Figures

STEP = "A step at its fullest, counted storage by storage"


def instruments(lanes: Sequence[tuple[str, Figures]]) -> dict[str, dict[str, int]]:
    """Peak bytes by instrument, then by lane; only what was measured. The most telling one comes first.

    A counted peak and a sampled one are two instruments, and so is each of the three counters.
    """
    found: dict[str, dict[str, int]] = {}
    for name, figures in lanes:
        if figures.step_peaks:
            found.setdefault(STEP, {})[name] = step_bytes(figures)
    for key, method in ((key, method) for key in COUNTERS for method in ("counter", "sampled")):
        for name, figures in lanes:
            counter: CounterFacts | None = getattr(figures, key)
            if counter is not None and counter.peak_bytes and counter.method == method:
                found.setdefault(_title(key, method), {})[name] = counter.peak_bytes
    return found


def step_bytes(figures: Figures) -> int:
    """Of the fullest place."""
    return max((sum(held.values()) for held in figures.step_peaks.values()), default=0)


def fullest_place(figures: Figures) -> dict[str, int]:
    """Its categories; empty where nothing was counted."""
    return max(figures.step_peaks.values(), key=lambda held: sum(held.values()), default={})


def _title(key: str, method: str) -> str:
    name = COUNTERS[key]
    return f"{name[0].upper()}{name[1:]}, peak{' (sampled)' if method == 'sampled' else ''}"
