"""How often each parameter was updated: Adam's bias correction goes by it, and torch counts for each.

A checkpoint has the most of them as `optimizer_steps`, and in `optimizer_steps_of` those that are fewer, by
name: of parameters that had no gradient at some steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from xtrain.contract import JSON


@dataclass(frozen=True)
class StepCounts:
    """Updates made, skipped ones left out."""

    most: int
    fewer: Mapping[str, int]

    def of(self, name: str) -> int:
        return self.fewer.get(name, self.most)

    def as_extras(self) -> dict[str, JSON]:
        return {"optimizer_steps": self.most, "optimizer_steps_of": dict(self.fewer)}


def counted(states: Mapping[str, Mapping[str, Any]]) -> StepCounts:
    """Of torch's optimizer states, by parameter name; empty where there never was a gradient."""
    counts = {name: int(state.get("step", 0)) for name, state in states.items()}
    most = max(counts.values(), default=0)
    return StepCounts(most, {name: count for name, count in counts.items() if count != most})


def stored_counts(extras: Mapping[str, Any]) -> StepCounts:
    """As a checkpoint's extras have them; ValueError where they are none."""
    most, fewer = extras["optimizer_steps"], extras.get("optimizer_steps_of") or {}
    if not isinstance(fewer, Mapping):
        raise ValueError(f"optimizer_steps_of: found {type(fewer).__name__}, expected counts by name")
    for what, count in {"optimizer_steps": most, **fewer}.items():
        if type(count) is not int or not 0 <= count <= most:
            raise ValueError(f"updates of {what}: found {count!r}, expected a number of them")
    return StepCounts(most, fewer)
