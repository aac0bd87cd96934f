"""What saving costs in memory, on paper."""

from __future__ import annotations

from xtrain.plan.model import FP32
from xtrain.records.summary import format_bytes
from xtrain.spec.tree import AdamW, Spec


def background_copy_bytes(spec: Spec, parameters: int, world: int) -> int:
    """Host memory of one process that a save in the background keeps from save to save; 0 without such saves.

    Its part of the fp32 weights and of each moment, whatever dtype and device they have in training
    (xtrain/checkpoints/saving.py). Flat pieces are padded, so ranks differ by a few numbers.
    """
    if not spec.checkpoint.background:
        return 0
    moments = 2 if isinstance(spec.optimizer, AdamW) else int(spec.optimizer.momentum > 0)
    return FP32 * (1 + moments) * parameters // world


def save_notes(spec: Spec, parameters: int, world: int) -> list[str]:
    """What people should know of it, a sentence each."""
    copy_bytes = background_copy_bytes(spec, parameters, world)
    told = f"A save in the background keeps a copy of {format_bytes(copy_bytes)} on the host, per process."
    return [told] if copy_bytes else []
