"""Who writes what, and into which files: computed alike on every rank, without a word between them.

Parameters are shared out over ranks by bytes, and each rank's share is cut into files. All ranks write what
they hold of a file's tensors into it; the rank whose share it is finishes it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from xtrain.checkpoints.format import key_of
from xtrain.checkpoints.tensorfile import FileLayout, Shape
from xtrain.contract import StateForm, StateKey, StateKind

Family: TypeAlias = Literal["model", "optimizer"]
MOMENTS: tuple[StateKind, ...] = ("exp_avg", "exp_avg_sq", "momentum")
SHARD_BYTES = 1 << 30
"""Of fp32 weights in one file; a parameter is never cut, so a larger one has a file of its own."""


@dataclass(frozen=True)
class Shard:
    """One file of weights and one of their moments."""

    rank: int
    label: str
    """`00001-of-00004`, as Hugging Face numbers them."""
    shapes: Mapping[str, Shape]


@dataclass(frozen=True)
class PlannedFile:
    """One tensor file of a checkpoint."""

    name: str
    family: Family
    rank: int
    """Who finishes it."""
    layout: FileLayout


@dataclass(frozen=True)
class Plan:
    """Every tensor file of one checkpoint."""

    files: Sequence[PlannedFile]
    owners: Mapping[str, int]
    """Who writes what several ranks hold alike, by name."""
    wrapper: str = ""
    """What is left out in front of every name (xtrain/checkpoints/format.py)."""

    def key_of(self, name: str, kind: StateKind) -> str:
        """The key of a tensor in its file."""
        return key_of(name.removeprefix(self.wrapper), kind)

    @cached_property
    def file_of(self) -> Mapping[str, PlannedFile]:
        """By key."""
        return {key: file for file in self.files for key in file.layout.places}

    @cached_property
    def fingerprint(self) -> str:
        """Equal on two ranks that would write the same files."""
        headers = (file.name.encode() + file.layout.header for file in self.files)
        return hashlib.sha256(b"".join(headers)).hexdigest()


def plan_files(
    layout: Mapping[StateKey, StateForm], world: int, shard_bytes: int = SHARD_BYTES, wrapper: str = ""
) -> Plan:
    """The same for the same arguments, whatever their order. ValueError names what no checkpoint can hold."""
    shards = share_out({name: form.shape for (name, _), form in layout.items()}, world, shard_bytes)
    shard_of = {name: shard for shard in shards for name in shard.shapes}
    forms: dict[tuple[str, Family], dict[str, StateForm]] = {}
    for name, kind in sorted(layout):
        family: Family = "optimizer" if kind in MOMENTS else "model"
        key = key_of(name.removeprefix(wrapper), kind)
        forms.setdefault((shard_of[name].label, family), {})[key] = layout[name, kind]
    rank_of = {shard.label: shard.rank for shard in shards}
    files = [
        PlannedFile(f"{family}-{label}.safetensors", family, rank_of[label], FileLayout.of(tensors))
        for (label, family), tensors in sorted(forms.items())
    ]
    return Plan(files, {name: shard.rank for name, shard in shard_of.items()}, wrapper)


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
