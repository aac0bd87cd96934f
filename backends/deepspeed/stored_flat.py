"""Checkpoints of ZeRO: every rank's flat pieces, and where in them a parameter lies."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from xtrain.contract import JSON, StateKind
from xtrain.errors import RequestError

from .found import Found
from .pickles import DynamicLossScale, Fragment
from .stored_whole import KEYS, Stored, steps_in

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """Where consecutive elements of a parameter are."""

    rank: int
    group: int
    begin: int
    """In the rank's flat piece of that group."""
    numel: int


class Flat(Stored):
    """ZeRO: every rank's flat pieces."""

    def __init__(self, tag: Path, ranks: Sequence[Found]) -> None:
        super().__init__(tag)
        self.ranks = ranks
        expected = _first_number(ranks[0].at("partition_count"), len(ranks))
        if expected != len(ranks):
            raise RequestError(f"{tag} has the optimizer states of {len(ranks)} ranks, expected {expected}")

    @abstractmethod
    def places(self, name: str) -> list[Place]:
        """In the order of the parameter's elements."""

    @abstractmethod
    def weights(self, rank: int) -> Found:
        """Of each group, flat."""

    @abstractmethod
    def moments(self, rank: int) -> Found:
        """The optimizer's state of each group."""

    @property
    def optimizer_steps(self) -> int:
        groups = self.moments(0)
        first = next(iter(groups.value), 0) if isinstance(groups.value, dict) else 0
        return steps_in(groups.at(first), self.step)

    @property
    def loss_scaler(self) -> Mapping[str, JSON] | None:
        found = self.ranks[0].at("loss_scaler")
        if not isinstance(found.value, DynamicLossScale):
            return None
        values = Found(vars(found.value), found.file, found.place)
        return {
            "scale": values.at("cur_scale").number(),
            "hysteresis": values.at("cur_hysteresis").count(),
            "steps": values.at("cur_iter").count(),
            "last_overflow": int(values.at("last_overflow_iter").number()),  # -1 before the first
        }

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        import torch

        places = self.places(name)
        if kind == "buffer" or not places:
            return self.module.get(name) if kind in ("weight", "buffer") else None
        flat = [self._flat(place, kind) for place in places]
        if all(one.value is None for one in flat) and kind != "weight":
            return None
        return torch.cat([one.slice(p.begin, p.numel) for one, p in zip(flat, places, strict=True)])

    def _flat(self, place: Place, kind: StateKind) -> Found:
        if kind == "weight":
            return self.weights(place.rank).at(place.group)
        state = self.moments(place.rank).at(place.group)
        return state if state.value is None else state.at(KEYS[kind])


class FlatGroups(Flat):
    """Stages 1 and 2: each parameter group flat, cut into one piece per rank."""

    def names(self) -> Sequence[str]:
        own = dict.fromkeys(name for one in self._fragments for group in one for name, _ in group.items())
        return [*own, *(name for name in self.module if name not in own)]

    def places(self, name: str) -> list[Place]:
        return [
            Place(rank, group, *_fragment(fragments.at(name)))
            for rank, groups in enumerate(self._fragments)
            for group, fragments in enumerate(groups)
            if fragments.at(name).value is not None
        ]

    @cached_property
    def _fragments(self) -> list[list[Found]]:
        """Of each rank and group, by parameter name."""
        return [rank.at("param_slice_mappings").numbered() for rank in self.ranks]

    def weights(self, rank: int) -> Found:
        return self.ranks[rank].at("single_partition_of_fp32_groups")

    def moments(self, rank: int) -> Found:
        return self.ranks[rank].at("base_optimizer_state").at("state")


class Partitioned(Flat):
    """Stage 3: each parameter cut into one piece per rank, padded; these laid flat by groups."""

    def names(self) -> Sequence[str]:
        return [*self._shapes, *(name for name in self.module if name not in self._shapes)]

    def places(self, name: str) -> list[Place]:
        if name not in self._shapes:
            return []
        group, begin, numel = self._shapes[name]
        piece = math.ceil(numel / len(self.ranks))
        ranks = range(math.ceil(numel / piece)) if piece else range(0)
        return [Place(rank, group, begin, min(piece, numel - rank * piece)) for rank in ranks]

    def weights(self, rank: int) -> Found:
        return self.ranks[rank].at("fp32_flat_groups")

    def moments(self, rank: int) -> Found:
        return self.ranks[rank].at("optimizer_state_dict").at("state")

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Group, first element of a rank's piece in it, and elements of the whole parameter."""
        found = {}
        for group, shapes in enumerate(self.model_states.at("param_shapes").numbered()):
            begin = 0
            for name, shape in shapes.items():
                numel = math.prod(length.count() for length in shape.numbered())
                found[name] = (group, begin, numel)
                begin += math.ceil(numel / len(self.ranks))
        return found


def _fragment(found: Found) -> tuple[int, int]:
    """First element and number of elements."""
    if not isinstance(found.value, Fragment):
        raise found.refused("a place in a flat piece")
    values = Found(vars(found.value), found.file, found.place)
    return values.at("start").count(), values.at("numel").count()


def _first_number(found: Found, otherwise: int) -> int:
    """`partition_count` is a number, or one for each group."""
    first = found.at(0) if isinstance(found.value, list | tuple) else found
    return otherwise if first.value is None else first.count()
