"""Who writes what: parameters shared out over ranks by bytes, each rank's share cut into files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from xtrain.checkpoints.tensorfile import Shape

SHARD_BYTES = 1 << 30
"""Of fp32 weights in one file; a parameter is never cut, so a larger one has a file of its own."""


@dataclass(frozen=True)
class Shard:
    """One file of weights and one of their moments."""

    rank: int
    label: str
    """`00001-of-00004`, as Hugging Face numbers them."""
    shapes: Mapping[str, Shape]


def share_out(shapes: Mapping[str, Shape], world: int, shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Shards of nearly equal bytes per rank; the same on every rank, as it depends on the arguments alone."""
    load = [0] * world
    own: list[list[str]] = [[] for _ in range(world)]
    for name in sorted(shapes, key=lambda name: (-math.prod(shapes[name]), name)):
        rank = load.index(min(load))
        load[rank] += math.prod(shapes[name])
        own[rank].append(name)
    cut = [(rank, part) for rank in range(world) for part in _cut(own[rank], shapes, shard_bytes)]
    return [
        Shard(rank, f"{number:05d}-of-{len(cut):05d}", {name: shapes[name] for name in part})
        for number, (rank, part) in enumerate(cut, start=1)
    ]


def _cut(names: list[str], shapes: Mapping[str, Shape], shard_bytes: int) -> list[list[str]]:
    parts: list[list[str]] = []
    room = 0
    for name in names:
        size = 4 * math.prod(shapes[name])
        if not parts or size > room:
            parts.append([])
            room = shard_bytes
        parts[-1].append(name)
        room -= size
    return parts
