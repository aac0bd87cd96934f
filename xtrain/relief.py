"""A device is full: what filled it, and what to try next, cheapest first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from xtrain.contract import Backend, Moment, OutOfMemory, Resolved, StepMemory
from xtrain.records.summary import format_bytes, format_categories
from xtrain.remedies import Helps, remedies
from xtrain.spec.check import check_spec
from xtrain.spec.keys import covering
from xtrain.spec.tree import Spec

IN_A_STEP: tuple[Moment, ...] = ("step", "update")
LAST_RESORT = {"start": "a smaller model"}


def describe_out_of_memory(
    full: OutOfMemory, seen: StepMemory | None, resolved: Resolved, backend: Backend, saved: str
) -> str:
    """The message that a run ends with.

    `seen` is a step that was counted, this one or one before; `saved` a sentence on the last checkpoint.
    """
    shown = seen.peaks if seen and full.moment in IN_A_STEP else {full.device: _now(full)}
    rows = [f"  {place} held {format_categories(held)}" for place, held in shown.items() if held]
    if full.memory.live is not None:
        rows.append(f"  live tensors at that moment: {format_bytes(full.memory.live.bytes)}")
    helps = helps_on(backend, resolved.world)
    advice = remedies(resolved.spec, full.moment, _known(full, seen), helps)
    advice = advice or [LAST_RESORT.get(full.moment, "a shorter data.seq_len, or a smaller model")]
    return "\n".join(
        [
            f"{full}.",
            *(rows or ["  what it held is not known"]),
            *([saved] if saved else []),
            "Try, cheapest first:" if len(advice) > 1 else "Try:",
            *(f"  {one}" for one in advice),
        ]
    )


def about_checkpoint(last: Path | None) -> str:
    return f"The last checkpoint, {last}, is intact." if last else "There is no checkpoint yet."


def helps_on(backend: Backend, world: int) -> Helps:
    """Whether a changed spec can be run, and its new key has something to do there."""

    def helps(changed: Spec, key: str) -> bool:
        if check_spec(changed, world, here=False) or backend.problems(changed, world):
            return False
        return covering(key, backend.resolve(changed, world).idle) is None

    return helps


def _now(full: OutOfMemory) -> dict[str, int]:
    """By category: what the engine knows of; the rest of the live tensors is `other`."""
    held = dict(full.memory.categories or {})
    if full.memory.live is not None:
        held["other"] = held.get("other", 0) + max(0, full.memory.live.bytes - sum(held.values()))
    return held


def _known(full: OutOfMemory, seen: StepMemory | None) -> Mapping[str, int]:
    """What fills the device in a whole step, by category; empty where none was seen, or it was in none."""
    whole = seen is not None and seen.finished and full.moment in IN_A_STEP
    return seen.peaks.get(full.device, {}) if seen and whole else {}
