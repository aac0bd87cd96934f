"""What DeepSpeed's own checkpoints and universal ones hold, by parameter name. Needs torch, not DeepSpeed.

    mp_rank_00_model_states.pt                           stages 0 to 2: weights, counters; 0: the optimizer
    zero_pp_rank_0_mp_rank_00_model_states.pt            stage 3: counters, shapes
    [bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   a rank's flat pieces of fp32 weights and moments
    zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt   universal: whole tensors

A parameter lies in each rank's flat pieces where a mapping says (stages 1 and 2), or where shapes and the
number of ranks put it (stage 3). Written after the files of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from xtrain.contract import JSON, StateKind
from xtrain.errors import RequestError

from ..moments import MOMENTS
from .found import Found
from .pickles import DynamicLossScale, Fragment, load

if TYPE_CHECKING:
    import torch

LATEST = {"deepspeed": "latest", "ds-universal": "latest_universal"}
KEYS: dict[StateKind, str] = {kind: key for key, kind in MOMENTS.items()}
"""Our kinds of moments, and the optimizer's names."""
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_DIVIDED = re.compile(r"mp_rank_(?!00_)|^layer_")
"""Files of tensor-parallel ranks but the first, and of pipeline stages."""
_TAG = re.compile(r"\w[\w.-]*")
"""A folder's name, never `..`."""


def open_state(folder: Path, form: str) -> Stored:
    """The checkpoint in `folder`, or the latest of those in it; RequestError when there is none."""
    tag = _tagged(folder, form)
    if form == "ds-universal":
        return Universal(tag)
    if divided := [file for file in tag.glob("*.pt") if _DIVIDED.search(file.name)]:
        raise RequestError(
            f"{divided[0]}: found a model that is divided by tensors or stages, expected data parallelism "
            "alone; make it universal with deepspeed.checkpoint.ds_to_universal, and import that"
        )
    optimizer_files = sorted(tag.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    if not optimizer_files:
        return Replicated(tag)
    ranks = [_optimizer_state(file) for file in optimizer_files]
    return Partitioned(tag, ranks) if "fp32_flat_groups" in ranks[0].value else FlatGroups(tag, ranks)


class Stored(ABC):
    """One checkpoint; the contract is xtrain.checkpoints.foreign.ForeignState."""

    def __init__(self, tag: Path) -> None:
        self.tag = tag

    @cached_property
    def model_states(self) -> Found:
        for name in MODEL_STATES:
            if (self.tag / name).is_file():
                return _content(self.tag / name)
        raise RequestError(
            f"{self.tag} has none of {', '.join(MODEL_STATES)}: it is no checkpoint of DeepSpeed's"
        )

    @property
    def step(self) -> int:
        return self.model_states.at("global_steps").count()

    @cached_property
    def module(self) -> Mapping[str, torch.Tensor]:
        """Weights as the model has them, without what else modules keep; empty where nobody put them in."""
        found = self.model_states.at("module")
        return (
            {name: one.tensor() for name, one in found.items() if _is_tensor(one)}
            if found.value is not None
            else {}
        )

    @property
    @abstractmethod
    def optimizer_steps(self) -> int: ...

    @property
    def loss_scaler(self) -> Mapping[str, JSON] | None:
        return None

    @abstractmethod
    def names(self) -> Sequence[str]: ...

    @abstractmethod
    def read(self, name: str, kind: StateKind) -> torch.Tensor | None: ...


class Universal(Stored):
    """A folder per parameter."""

    def names(self) -> Sequence[str]:
        own = [path.name for path in (self.tag / "zero").iterdir() if path.is_dir()]
        return [*own, *(name for name in self.module if name not in own)]

    @property
    def optimizer_steps(self) -> int:
        for file in sorted((self.tag / "zero").glob("*/step.pt")):
            return _content(file).count()
        together = self.tag / "zero" / "optimizer_state.pt"
        found = _content(together) if together.is_file() else Found(None, str(together))
        for key in ("optimizer_state_dict", "state", 0, "step"):  # stage 3 has it here alone
            found = found.at(key) if found.value is not None else found
        return self.step if found.value is None else found.count()

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        file = self.tag / "zero" / name / f"{'fp32' if kind == 'weight' else KEYS.get(kind, kind)}.pt"
        if file.is_file():
            content = _content(file)
            return (content if _is_tensor(content) else content.at("param")).tensor()
        return self.module.get(name) if kind in ("weight", "buffer") else None


class Replicated(Stored):
    """Stage 0: everything in one file, moments by number."""

    def names(self) -> Sequence[str]:
        return list(self.module)

    @property
    def optimizer_steps(self) -> int:
        updated = [state for state in self._moments.values() if state.value is not None]
        return max((_steps(state, self.step) for state in updated), default=self.step)

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        if kind in ("weight", "buffer"):
            return self.module.get(name)
        return _moment(self._moments[name], kind) if name in self._moments else None

    @cached_property
    def _moments(self) -> Mapping[str, Found]:
        """By parameter name: the file numbers them in the order of the optimizer's groups."""
        stored = self.model_states.at("optimizer")
        if stored.value is None:
            return {}
        groups = stored.at("param_groups").numbered()
        states = [
            stored.at("state").at(number.count())
            for group in groups
            for number in group.at("params").numbered()
        ]
        stated = self.model_states.at("buffer_names")
        listed = stated.numbered() if stated.value is not None else []
        buffers = [one.value for one in listed if isinstance(one.value, str)]
        names = _untied([name for name in self.module if name not in buffers], self.module)
        for order in (names, _matrices_first(names, self.module)):
            if len(order) == len(states) and all(
                _fits(state, self.module[name]) for state, name in zip(states, order, strict=True)
            ):
                return dict(zip(order, states, strict=True))
        raise RequestError(
            f"{self.tag} was written without ZeRO, and which moment is whose cannot be told from it: its "
            "optimizer has groups that are neither all parameters in order nor matrices first"
        )


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
        return _steps(groups.at(first), self.step)

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


def _content(file: Path) -> Found:
    return Found(load(file), str(file))


def _is_tensor(found: Found) -> bool:
    import torch

    return isinstance(found.value, torch.Tensor)


def _moment(state: Found, kind: StateKind) -> torch.Tensor | None:
    """Of a parameter, or a group, that was updated; None of others."""
    found = state.at(KEYS[kind]) if state.value is not None else state
    return None if found.value is None else found.tensor()


def _fragment(found: Found) -> tuple[int, int]:
    """First element and number of elements."""
    if not isinstance(found.value, Fragment):
        raise found.refused("a place in a flat piece")
    values = Found(vars(found.value), found.file, found.place)
    return values.at("start").count(), values.at("numel").count()


def _tagged(folder: Path, form: str) -> Path:
    pointer = folder / LATEST[form]
    if not folder.is_dir():
        raise RequestError(
            f"{folder} is not there; expected a checkpoint of DeepSpeed's, or a folder of them"
        )
    if pointer.is_file():
        tag = pointer.read_text(encoding="utf-8", errors="replace")[:200].strip()
        if not _TAG.fullmatch(tag) or not (folder / tag).is_dir():
            raise RequestError(f"{pointer} names {tag!r}; expected a folder beside it")
        folder = folder / tag
    if (folder / "zero").is_dir() != (form == "ds-universal"):
        found = "a universal checkpoint" if form == "deepspeed" else "no folder `zero`"
        other = "ds-universal" if form == "deepspeed" else "deepspeed"
        raise RequestError(f"{folder}: found {found}; try --from {other}")
    return folder


def _rank_of(file: Path) -> int:
    match = re.search(r"pp_rank_(\d+)", file.name)
    return int(match[1]) if match else 0


def _optimizer_state(file: Path) -> Found:
    state = _content(file).at("optimizer_state_dict")
    named = state.value.keys() if isinstance(state.value, dict) else set()
    if not {"fp32_flat_groups", "param_slice_mappings"} & named:
        raise RequestError(
            f"{file} has no optimizer state by parameter name: expected stage 1, 2 or 3 of a recent DeepSpeed"
        )
    return state


def _steps(state: Found, otherwise: int) -> int:
    step = state.at("step") if state.value is not None else state
    return otherwise if step.value is None else step.count()


def _first_number(found: Found, otherwise: int) -> int:
    """`partition_count` is a number, or one for each group."""
    first = found.at(0) if isinstance(found.value, list | tuple) else found
    return otherwise if first.value is None else first.count()


def _untied(names: Sequence[str], module: Mapping[str, torch.Tensor]) -> list[str]:
    """The first name of each parameter: what is tied has two in a state dict, and one in the optimizer."""
    import torch

    first: list[str] = []
    for name in names:
        weight = module[name]
        others = (module[other] for other in first if weight.ndim >= 2)
        if not any(other.shape == weight.shape and torch.equal(other, weight) for other in others):
            first.append(name)
    return first


def _matrices_first(names: Sequence[str], module: Mapping[str, torch.Tensor]) -> list[str]:
    return sorted(names, key=lambda name: module[name].ndim < 2)


def _fits(state: Found, weight: torch.Tensor) -> bool:
    moments = [_moment(state, kind) for kind in KEYS]
    return all(moment is None or moment.shape == weight.shape for moment in moments)
