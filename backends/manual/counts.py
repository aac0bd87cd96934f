"""How many blocks each device gets, where `manual.split` says it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from xtrain.errors import RequestError


def split_blocks(split: Sequence[int] | Sequence[float], blocks: int) -> list[int]:
    """Counts from `manual.split`: counts, which must sum to the model's blocks, or fractions of them."""
    counts = [part for part in split if isinstance(part, int)]
    if len(counts) < len(split):
        ends = [0, *(round(math.fsum(split[: place + 1]) * blocks) for place in range(len(split)))]
        return [end - start for start, end in pairwise(ends)]
    if sum(counts) != blocks:
        raise RequestError(
            f"manual.split: found {counts}, which sum to {sum(counts)}, expected counts that sum to the "
            f"{blocks} blocks of the model; or use split: auto"
        )
    return counts
