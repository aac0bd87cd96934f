"""Activation checkpointing as the spec asks for it: which blocks, in which groups, and what they keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from xtrain.errors import RequestError
from xtrain.spec.tree import Checkpointing, Spec

if TYPE_CHECKING:
    from torch import nn


def recomputes(spec: Spec) -> bool:
    return spec.techniques.checkpointing.enabled


def checkpoint_activations(model: nn.Module, spec: Spec) -> None:
    """Make blocks of `model` recompute, in place, where the spec asks for it.

    Raises RequestError where the blocks cannot be found, or are fewer than the spec supposes.
    """
    from xtrain.models.blocks import find_blocks
    from xtrain.techniques.products import keep_products
    from xtrain.techniques.recompute import RecomputeGroup, keep_all

    if not recomputes(spec):
        return
    chosen = spec.techniques.checkpointing
    blocks = find_blocks(model, spec.model.blocks)
    contexts = keep_products if chosen.selective is not None and chosen.selective.ops else keep_all
    for group in groups(chosen, len(blocks)):
        RecomputeGroup([blocks[place] for place in group], contexts)


def groups(chosen: Checkpointing, blocks: int) -> list[Sequence[int]]:
    """The places of the blocks that are recomputed together, in order; a block in none is kept.

    A ratio recomputes the first blocks, each by itself: the backward pass reaches them last, when
    the others have let go of what they kept.
    """
    for key, value in (("every", chosen.every), ("number", chosen.number)):
        if value is not None and value > blocks:
            raise RequestError(
                f"memory.checkpointing.{key}: found {value}, expected at most the {blocks} blocks of the "
                f"model; nearest: {blocks}"
            )
    if chosen.every is not None:
        return [range(start, min(start + chosen.every, blocks)) for start in range(0, blocks, chosen.every)]
    if chosen.selective is not None:
        share = 1.0 if chosen.selective.ratio is None else chosen.selective.ratio
        return [[place] for place in range(max(1, round(share * blocks)))]
    number = chosen.number or round(math.sqrt(blocks))
    ends = [blocks * done // number for done in range(number + 1)]
    return [range(start, end) for start, end in pairwise(ends)]
