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
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtrain.contract import JSON, StateKind
from xtrain.errors import RequestError

from .pickles import DynamicLossScale, load

if TYPE_CHECKING:
    import torch

LATEST = {"deepspeed": "latest", "ds-universal": "latest_universal"}
KEYS: dict[StateKind, str] = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum": "momentum_buffer"}
"""Our kinds of moments, and the optimizer's names."""
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_DIVIDED = re.compile(r"mp_rank_(?!00_)|^layer_")
"""Files of tensor-parallel ranks but the first, and of pipeline stages."""
_TAG = re.compile(r"[\w.-]+")


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
    return Partitioned(tag, ranks) if "fp32_flat_groups" in ranks[0] else FlatGroups(tag, ranks)


class Stored(ABC):
    """One checkpoint; the contract is xtrain.checkpoints.foreign.ForeignState."""

    def __init__(self, tag: Path) -> None:
        self.tag = tag

    @cached_property
    def model_states(self) -> Mapping[str, Any]:
        for name in MODEL_STATES:
            if (self.tag / name).is_file():
                found = load(self.tag / name)
                if isinstance(found, dict):
                    return found
        raise RequestError(
            f"{self.tag} has none of {', '.join(MODEL_STATES)}: it is no checkpoint of DeepSpeed's"
        )

    @property
    def step(self) -> int:
        return _count(self.model_states.get("global_steps"), f"{self.tag}: global_steps")

    @property
    def module(self) -> Mapping[str, torch.Tensor]:
        """Weights as the model has them; empty where nobody put them in."""
        return self.model_states.get("module") or {}

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
            return int(load(file))
        try:  # stage 3 has it here alone
            return int(
                load(self.tag / "zero" / "optimizer_state.pt")["optimizer_state_dict"]["state"][0]["step"]
            )
        except (KeyError, TypeError, ValueError):
            return self.step

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        file = self.tag / "zero" / name / f"{'fp32' if kind == 'weight' else KEYS.get(kind, kind)}.pt"
        if file.is_file():
            content = load(file)
            found: torch.Tensor = content["param"] if isinstance(content, dict) else content
            return found
        return self.module.get(name) if kind in ("weight", "buffer") else None


class Replicated(Stored):
    """Stage 0: everything in one file, moments by number."""

    def names(self) -> Sequence[str]:
        return list(self.module)

    @property
    def optimizer_steps(self) -> int:
        return _steps(next(iter(self._moments.values()), {}), self.step)

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        if kind in ("weight", "buffer"):
            return self.module.get(name)
        moment: torch.Tensor | None = self._moments.get(name, {}).get(KEYS[kind])
        return moment

    @cached_property
    def _moments(self) -> Mapping[str, Mapping[str, Any]]:
        """By parameter name: the file numbers them in the order of the optimizer's groups."""
        stored = self.model_states.get("optimizer") or {}
        groups, states = stored.get("param_groups", []), stored.get("state", {})
        numbers = [number for group in groups for number in group["params"]]
        buffers = set(self.model_states.get("buffer_names") or ())
        names = _untied([name for name in self.module if name not in buffers], self.module)
        for order in (names, _matrices_first(names, self.module)):
            if len(order) == len(numbers) and all(
                _fits(states.get(number, {}), self.module[name])
                for number, name in zip(numbers, order, strict=True)
            ):
                return {name: states.get(number, {}) for number, name in zip(numbers, order, strict=True)}
        raise RequestError(
            f"{self.tag} was written without ZeRO, and which moment is whose cannot be told from it: its "
            "optimizer has groups that are neither all parameters in order nor matrices first"
        )


class Flat(Stored):
    """ZeRO: every rank's flat pieces."""

    def __init__(self, tag: Path, ranks: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(tag)
        self.ranks = ranks
        expected = int(_first_number(ranks[0].get("partition_count"), len(ranks)))
        if expected != len(ranks):
            raise RequestError(f"{tag} has the optimizer states of {len(ranks)} ranks, expected {expected}")

    @abstractmethod
    def places(self, name: str) -> list[tuple[int, int, int, int]]:
        """(rank, group, first element, elements), in the order of the parameter's elements."""

    @abstractmethod
    def weights(self, rank: int) -> Sequence[torch.Tensor]:
        """Of each group, flat."""

    @abstractmethod
    def moments(self, rank: int) -> Mapping[int, Mapping[str, Any]]:
        """The optimizer's state of each group."""

    @property
    def optimizer_steps(self) -> int:
        return _steps(next(iter(self.moments(0).values()), {}), self.step)

    @property
    def loss_scaler(self) -> Mapping[str, JSON] | None:
        found = self.ranks[0].get("loss_scaler")
        if not isinstance(found, DynamicLossScale):
            return None
        values: Any = vars(found)
        return {
            "scale": float(values["cur_scale"]),
            "hysteresis": int(values["cur_hysteresis"]),
            "steps": int(values["cur_iter"]),
            "last_overflow": int(values["last_overflow_iter"]),
        }

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        import torch

        places = self.places(name)
        if kind == "buffer" or not places:
            return self.module.get(name) if kind in ("weight", "buffer") else None
        pieces = [self._flat(rank, group, kind) for rank, group, _, _ in places]
        if any(piece is None for piece in pieces):
            return None
        return torch.cat(
            [
                piece[begin : begin + numel]
                for piece, (_, _, begin, numel) in zip(pieces, places, strict=True)
                if piece is not None
            ]
        )

    def _flat(self, rank: int, group: int, kind: StateKind) -> torch.Tensor | None:
        if kind == "weight":
            return self.weights(rank)[group]
        moment: torch.Tensor | None = self.moments(rank).get(group, {}).get(KEYS[kind])
        return moment


class FlatGroups(Flat):
    """Stages 1 and 2: each parameter group flat, cut into one piece per rank."""

    def names(self) -> Sequence[str]:
        own = {name for rank in self.ranks for group in rank["param_slice_mappings"] for name in group}
        return [*own, *(name for name in self.module if name not in own)]

    def places(self, name: str) -> list[tuple[int, int, int, int]]:
        return [
            (number, group, fragments[name].start, fragments[name].numel)
            for number, rank in enumerate(self.ranks)
            for group, fragments in enumerate(rank["param_slice_mappings"])
            if name in fragments
        ]

    def weights(self, rank: int) -> Sequence[torch.Tensor]:
        found: Sequence[torch.Tensor] = self.ranks[rank]["single_partition_of_fp32_groups"]
        return found

    def moments(self, rank: int) -> Mapping[int, Mapping[str, Any]]:
        found: Mapping[int, Mapping[str, Any]] = self.ranks[rank]["base_optimizer_state"]["state"]
        return found


class Partitioned(Flat):
    """Stage 3: each parameter cut into one piece per rank, padded; these laid flat by groups."""

    def names(self) -> Sequence[str]:
        return [*self._shapes, *(name for name in self.module if name not in self._shapes)]

    def places(self, name: str) -> list[tuple[int, int, int, int]]:
        if name not in self._shapes:
            return []
        group, begin, numel = self._shapes[name]
        piece = math.ceil(numel / len(self.ranks))
        ranks = range(math.ceil(numel / piece)) if piece else range(0)
        return [(rank, group, begin, min(piece, numel - rank * piece)) for rank in ranks]

    def weights(self, rank: int) -> Sequence[torch.Tensor]:
        found: Sequence[torch.Tensor] = self.ranks[rank]["fp32_flat_groups"]
        return found

    def moments(self, rank: int) -> Mapping[int, Mapping[str, Any]]:
        found: Mapping[int, Mapping[str, Any]] = self.ranks[rank]["optimizer_state_dict"]["state"]
        return found

    @cached_property
    def _shapes(self) -> Mapping[str, tuple[int, int, int]]:
        """Group, first element of a rank's piece in it, and elements of the whole parameter."""
        found = {}
        for group, shapes in enumerate(self.model_states["param_shapes"]):
            begin = 0
            for name, shape in shapes.items():
                numel = math.prod(shape)
                found[name] = (group, begin, numel)
                begin += math.ceil(numel / len(self.ranks))
        return found


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


def _optimizer_state(file: Path) -> Mapping[str, Any]:
    content = load(file)
    state = content.get("optimizer_state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not {"fp32_flat_groups", "param_slice_mappings"} & state.keys():
        raise RequestError(
            f"{file} has no optimizer state by parameter name: expected stage 1, 2 or 3 of a recent DeepSpeed"
        )
    return state


def _steps(state: Mapping[str, Any], otherwise: int) -> int:
    return int(state["step"]) if "step" in state else otherwise


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or value < 0:
        raise RequestError(f"{what}: found {value!r}, expected the number of updates")
    return value


def _first_number(value: Any, otherwise: int) -> int:
    """`partition_count` is a number, or one for each group."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    return value if isinstance(value, int) else otherwise


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


def _fits(state: Mapping[str, Any], weight: torch.Tensor) -> bool:
    moments = [state[key] for key in KEYS.values() if key in state]
    return all(moment is None or moment.shape == weight.shape for moment in moments)
