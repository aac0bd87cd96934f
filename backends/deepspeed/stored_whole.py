"""What all checkpoints of DeepSpeed's have, and those with whole tensors: universal ones, and of stage 0."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from xtrain.contract import JSON, StateKind
from xtrain.errors import RequestError

from ..moments import MOMENTS
from .found import Found
from .pickles import load

if TYPE_CHECKING:
    import torch

KEYS: dict[StateKind, str] = {kind: key for key, kind in MOMENTS.items()}
"""Our kinds of moments, and the optimizer's names."""
MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


class Stored(ABC):
    """One checkpoint; the contract is xtrain.checkpoints.foreign.ForeignState."""

    def __init__(self, tag: Path) -> None:
        self.tag = tag

    @cached_property
    def model_states(self) -> Found:
        for name in MODEL_STATES:
            if (self.tag / name).is_file():
                return content_of(self.tag / name)
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
            return content_of(file).count()
        together = self.tag / "zero" / "optimizer_state.pt"
        found = content_of(together) if together.is_file() else Found(None, str(together))
        for key in ("optimizer_state_dict", "state", 0, "step"):  # stage 3 has it here alone
            found = found.at(key) if found.value is not None else found
        return self.step if found.value is None else found.count()

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        file = self.tag / "zero" / name / f"{'fp32' if kind == 'weight' else KEYS.get(kind, kind)}.pt"
        if file.is_file():
            content = content_of(file)
            return (content if _is_tensor(content) else content.at("param")).tensor()
        return self.module.get(name) if kind in ("weight", "buffer") else None


class Replicated(Stored):
    """Stage 0: everything in one file, moments by number."""

    def names(self) -> Sequence[str]:
        return list(self.module)

    @property
    def optimizer_steps(self) -> int:
        updated = [state for state in self._moments.values() if state.value is not None]
        return max((steps_in(state, self.step) for state in updated), default=self.step)

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
        if stored.at("optimizer_state_dict").value is not None:
            raise RequestError(
                f"{stored.file}: found 16-bit weights without ZeRO, whose masters have no names; expected "
                "ZeRO stage 1, 2 or 3, or fp32. Its weights alone: save them with save_pretrained, --from hf"
            )
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


def content_of(file: Path) -> Found:
    return Found(load(file), str(file))


def _is_tensor(found: Found) -> bool:
    import torch

    return isinstance(found.value, torch.Tensor)


def _moment(state: Found, kind: StateKind) -> torch.Tensor | None:
    """Of a parameter, or a group, that was updated; None of others."""
    found = state.at(KEYS[kind]) if state.value is not None else state
    return None if found.value is None else found.tensor()


def steps_in(state: Found, otherwise: int) -> int:
    step = state.at("step") if state.value is not None else state
    return otherwise if step.value is None else step.count()


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
