"""Memory as reports compare it: unlike counters never meet, nor a device's bytes and its host's."""

from __future__ import annotations

from collections.abc import Sequence

from xtrain.contract import HOST
from xtrain.records.record import CounterFacts
from xtrain.records.summary import COUNTERS
from xtrain.report.comparison import Figures

STEP = "A step at its fullest, on the device"
"""Counted storage by storage. Where the host itself computes, it is the device."""
STEP_ON_HOST = "A step at its fullest, on the host beside the device"


def instruments(lanes: Sequence[tuple[str, Figures]]) -> dict[str, dict[str, int]]:
    """Peak bytes by instrument, then by lane; only what was measured. The most telling one comes first.

    A counted peak and a sampled one are two instruments, and so is each of the three counters.
    """
    found: dict[str, dict[str, int]] = {}
    for name, figures in lanes:
        if figures.step_peaks:
            found.setdefault(STEP, {})[name] = step_bytes(figures)
    for name, figures in lanes:
        if (beside := host_bytes(figures)) is not None:
            found.setdefault(STEP_ON_HOST, {})[name] = beside
    for key, method in ((key, method) for key in COUNTERS for method in ("counter", "sampled")):
        for name, figures in lanes:
            counter: CounterFacts | None = getattr(figures, key)
            if counter is not None and counter.peak_bytes and counter.method == method:
                found.setdefault(_title(key, method), {})[name] = counter.peak_bytes
    return found


def by_importance(peaks: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """A step's places: the devices first, the fullest one leading. The host leads where there is no other."""
    order = sorted(peaks, key=lambda place: (place == HOST, -sum(peaks[place].values())))
    return {place: peaks[place] for place in order}


def fullest_device(figures: Figures) -> dict[str, int]:
    """Its categories; those of the host where nothing else computes, empty where nothing was counted."""
    return next(iter(by_importance(figures.step_peaks).values()), {})


def step_bytes(figures: Figures) -> int:
    """Of the fullest device."""
    return sum(fullest_device(figures).values())


def host_bytes(figures: Figures) -> int | None:
    """What the host holds for a device; None where nothing was counted and where the host itself computes."""
    if not set(figures.step_peaks) - {HOST}:
        return None
    return sum(figures.step_peaks.get(HOST, {}).values())


def _title(key: str, method: str) -> str:
    name = COUNTERS[key]
    return f"{name[0].upper()}{name[1:]}, peak{' (sampled)' if method == 'sampled' else ''}"
