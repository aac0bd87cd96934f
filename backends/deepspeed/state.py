"""The training state by parameter name: out of DeepSpeed's shards, and back into them.

DeepSpeed keeps fp32 weights and moments flat: whole at stage 0, cut into one flat piece per rank and
group at stages 1 and 2, one piece per rank and parameter at stage 3. Getting a whole tensor is public
(`safe_get_full_*`); setting one needs private names of 0.19.8, each with its reason beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from xtrain.contract import StateKind, StateReader, StateTensor

MOMENTS: dict[str, StateKind] = {
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "momentum_buffer": "momentum",
}
"""torch's name in an optimizer's state, and ours."""


class Shards(ABC):
    """fp32 weights (`key` None) and moments of one engine. Every method is collective."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.zero = engine.optimizer
        self.optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)

    @abstractmethod
    def flat(self) -> list[torch.Tensor]:
        """The tensors that the optimizer updates on this rank."""

    @abstractmethod
    def get(self, parameter: nn.Parameter, key: str | None) -> torch.Tensor: ...

    @abstractmethod
    def set(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None: ...

    @abstractmethod
    def publish(self) -> None:
        """Make the model compute with the weights that were set."""

    def link(self) -> None:  # noqa: B027 - most have nothing to do
        """Let parameters find their moments."""

    def kept(self) -> tuple[str, ...]:
        """The moments that this optimizer keeps; a stored state may be another's."""
        return ("exp_avg", "exp_avg_sq") if "betas" in self.optimizer.defaults else ("momentum_buffer",)

    def moments(self) -> list[str]:
        """Which moments exist; none before the first update."""
        states = [self.optimizer.state[tensor] for tensor in self.flat() if tensor in self.optimizer.state]
        return [key for key in MOMENTS if any(isinstance(s.get(key), torch.Tensor) for s in states)]

    def steps(self) -> int:
        states = (self.optimizer.state[tensor] for tensor in self.flat() if tensor in self.optimizer.state)
        return int(next((state["step"] for state in states if "step" in state), 0))

    def make_moments(self, keys: list[str]) -> None:
        """Zeros for every moment in `keys`, as the optimizer would have made them at its first update."""
        for tensor in self.flat():
            for key in keys:
                self.optimizer.state[tensor].setdefault(key, torch.zeros_like(tensor))
        self.link()

    def set_steps(self, steps: int) -> None:
        """One tensor per state: a shared one would be counted up once for each (a fault in 0.19.8)."""
        for tensor in self.flat():
            state = self.optimizer.state[tensor]
            if "exp_avg" in state:
                state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=tensor.device)


class Replicated(Shards):
    """Stage 0: every rank has everything."""

    def flat(self) -> list[torch.Tensor]:
        return [p for p in self.engine.module.parameters() if p.requires_grad]

    def get(self, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
        tensor: torch.Tensor = parameter if key is None else self.optimizer.state[parameter][key]
        return tensor

    def set(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        self.get(parameter, key).copy_(value)

    def publish(self) -> None:
        pass


class FlatGroups(Shards):
    """Stages 1 and 2: a rank's piece of each parameter group, with a map from parameter to fragment."""

    def flat(self) -> list[torch.Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def link(self) -> None:
        # States are linked after the first group's step only; the other groups' are then not found.
        if self.moments():
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def get(self, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        full = (
            safe_get_full_fp32_param(parameter)
            if key is None
            else safe_get_full_optimizer_state(parameter, key)
        )
        assert isinstance(full, torch.Tensor)
        return full

    def set(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(self.zero.device)
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def publish(self) -> None:
        self.zero.update_lp_params()


class Partitioned(Shards):
    """Stage 3: a rank's piece of each parameter, in groups that may live on a drive."""

    def flat(self) -> list[torch.Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def make_moments(self, keys: list[str]) -> None:
        for group, tensor in enumerate(self.flat()):
            with self._in_memory(group):
                for key in keys:
                    self.optimizer.state[tensor].setdefault(key, torch.zeros_like(tensor))

    def get(self, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
        if self.engine.world_size == 1 and not self.zero.swap_optimizer:
            # The piece is the whole: gathering it would be two copies of it.
            piece: torch.Tensor = self.zero._get_fp32_opt_state_partition(parameter, True, key)[0]
            return piece[: parameter.ds_numel].view(parameter.ds_shape)  # type: ignore[attr-defined]
        full: torch.Tensor = self.zero.get_full_hp_param(parameter, key)
        return full

    def set(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        # By our own piece: DeepSpeed's setter of whole tensors fails where the last piece is padded, and
        # its setter of pieces where the model's own weights are on a drive.
        group, start, piece_numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
        mine = value.flatten()[piece_numel * self.engine.global_rank :][:piece_numel]
        with self._in_memory(group):
            flat = self.zero.fp32_partitioned_groups_flat[group]
            held = flat if key is None else self.optimizer.state[flat][key]
            piece = held.data.narrow(0, start, piece_numel)
            piece[: mine.numel()].copy_(mine)
            piece[mine.numel() :].zero_()

    def publish(self) -> None:
        for group in range(len(self.zero.fp32_partitioned_groups_flat)):
            with self._in_memory(group):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
        kept = self.zero.persistent_parameters  # small ones stay gathered: gather them anew
        if kept:
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    @contextmanager
    def _in_memory(self, group: int) -> Iterator[None]:
        """Bring a group's weights and moments from the drive, if that is where they are, and back."""
        on_drive = self.zero._swappable_optimizer_subgroup(group)
        if on_drive:
            self.zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if on_drive:
            self.zero._optimizer_states_and_gradient_swap_out(group)


def shards_of(engine: Any, stage: int) -> Shards:
    return (Replicated, FlatGroups, FlatGroups, Partitioned)[stage](engine)


def state_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all parameters and buffers, by name; whole ones, whatever this rank has of them."""
    whole = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    return whole | {name: tuple(buffer.shape) for name, buffer in module.named_buffers()}


def export_state(shards: Shards, rank: int, owner: Callable[[str], int]) -> Iterator[StateTensor]:
    """Every tensor of the state, one at a time, on the rank that owns it."""

    def tensor(name: str, kind: StateKind, full: torch.Tensor) -> StateTensor:
        return StateTensor(name, kind, _on_host(full) if owner(name) == rank else None)

    shards.link()
    keys = shards.moments()
    for name, parameter in shards.engine.module.named_parameters():
        if not parameter.requires_grad:
            yield tensor(name, "weight", _frozen(parameter))
            continue
        yield tensor(name, "weight", shards.get(parameter, None))
        for key in keys:
            yield tensor(name, MOMENTS[key], shards.get(parameter, key))
    for name, buffer in shards.engine.module.named_buffers():
        yield StateTensor(name, "buffer", buffer.detach().cpu().clone() if owner(name) == rank else None)


@torch.no_grad()
def import_state(shards: Shards, reader: StateReader) -> None:
    """Set weights, buffers and moments on every rank; ValueError names what does not fit."""
    named = dict(shards.engine.module.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    keys = [key for key in shards.kept() if any(reader.read(n, MOMENTS[key]) is not None for n in trained)]
    shards.make_moments(keys)
    for name, parameter in named.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        value = _expect(reader, name, "weight", shape)
        if name not in trained:
            _set_frozen(parameter, value)
            continue
        shards.set(parameter, value, None)
        for key in keys:
            shards.set(parameter, _expect(reader, name, MOMENTS[key], shape), key)
    for name, buffer in shards.engine.module.named_buffers():
        buffer.copy_(_expect(reader, name, "buffer", tuple(buffer.shape)))
    shards.publish()


def _expect(reader: StateReader, name: str, kind: StateKind, shape: tuple[int, ...]) -> torch.Tensor:
    stored = reader.read(name, kind)
    if stored is None:
        raise ValueError(f"the state has no {kind} of {name}")
    if tuple(stored.shape) != shape:
        raise ValueError(f"{kind} of {name}: found {tuple(stored.shape)}, expected {shape}")
    return stored


def _frozen(parameter: nn.Parameter) -> torch.Tensor:
    if not hasattr(parameter, "ds_shape"):
        return parameter
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def _set_frozen(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if not hasattr(parameter, "ds_shape"):
        parameter.copy_(value)
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is fp32 on the CPU already: whoever keeps it longer copies it."""
    return tensor.detach().to("cpu", torch.float32)
