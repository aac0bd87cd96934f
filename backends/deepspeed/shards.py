"""Where DeepSpeed keeps fp32 weights and moments, at each stage, and how they are got at.

They are flat: whole at stage 0, cut into one flat piece per rank and group at stages 1 and 2, one piece per
rank and parameter at stage 3. Its public getters (`safe_get_full_*`) gather every tensor on every rank, so
private names of 0.19.8 are used, each with its reason beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from ..moments import MOMENTS
from ..step_counts import StepCounts, counted

Piece: TypeAlias = "tuple[int, torch.Tensor]"
"""Place of its first element in the whole parameter, and its elements."""


class Shards(ABC):
    """fp32 weights (`key` None) and moments of one engine. Collective, but for `piece` and the names."""

    replicated = False
    """Whether each rank's pieces are the whole."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.zero = engine.optimizer
        self.optimizer: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)

    @abstractmethod
    def flat(self) -> list[torch.Tensor]:
        """The tensors that the optimizer updates on this rank."""

    @abstractmethod
    def piece(self, parameter: nn.Parameter, key: str | None) -> Piece | None:
        """What this rank has of it, in its own memory; None where it has nothing."""

    @abstractmethod
    def set(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None: ...

    @abstractmethod
    def publish(self) -> None:
        """Make the model compute with the weights that were set."""

    def link(self) -> None:  # noqa: B027 - most have nothing to do
        """Let parameters find their moments."""

    def moments(self) -> list[str]:
        """Which moments exist; none before the first update."""
        states = [self.optimizer.state[tensor] for tensor in self.flat() if tensor in self.optimizer.state]
        return [key for key in MOMENTS if any(isinstance(s.get(key), torch.Tensor) for s in states)]

    def moments_of(self, parameter: nn.Parameter) -> list[str]:
        """The same for every parameter where moments are kept by groups of them."""
        return self.moments()

    def step_counts(self) -> StepCounts:
        """One for all: at each step everything is updated, what had no gradient with zeros."""
        states = {str(n): self.optimizer.state.get(tensor, {}) for n, tensor in enumerate(self.flat())}
        return StepCounts(counted(states).most, {})

    def make_moments(self, keys: list[str]) -> None:
        """Zeros for every moment in `keys`, as the optimizer would have made them at its first update."""
        for tensor in self.flat():
            for key in keys:
                self.optimizer.state[tensor].setdefault(key, torch.zeros_like(tensor))
        self.link()

    def set_step_counts(self, counts: StepCounts) -> list[str]:
        """Returns what it cannot carry, a sentence each."""
        for tensor in self.flat():
            self._set_step(tensor, counts.most)
        return [_counted_together(counts)] if counts.fewer else []

    def _set_step(self, tensor: torch.Tensor, count: int) -> None:
        """One tensor per state: a shared one would be counted up once for each (a fault in 0.19.8)."""
        state = self.optimizer.state[tensor]
        if "exp_avg" in state:
            state["step"] = torch.tensor(float(count), dtype=torch.float32, device=tensor.device)


class Replicated(Shards):
    """Stage 0: every rank has everything."""

    replicated = True

    def flat(self) -> list[torch.Tensor]:
        return list(self._trained().values())

    def moments_of(self, parameter: nn.Parameter) -> list[str]:
        state = self.optimizer.state.get(parameter, {})
        return [key for key in MOMENTS if isinstance(state.get(key), torch.Tensor)]

    def step_counts(self) -> StepCounts:
        return counted({name: self.optimizer.state.get(p, {}) for name, p in self._trained().items()})

    def set_step_counts(self, counts: StepCounts) -> list[str]:
        for name, parameter in self._trained().items():
            self._set_step(parameter, counts.of(name))
        return []

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}

    def piece(self, parameter: nn.Parameter, key: str | None) -> Piece:
        return 0, self._whole(parameter, key)

    def set(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        self._whole(parameter, key).copy_(value)

    def _whole(self, parameter: nn.Parameter, key: str | None) -> torch.Tensor:
        tensor: torch.Tensor = parameter if key is None else self.optimizer.state[parameter][key]
        return tensor

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

    def piece(self, parameter: nn.Parameter, key: str | None) -> Piece | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)

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

    def piece(self, parameter: nn.Parameter, key: str | None) -> Piece | None:
        numel: int = parameter.ds_numel  # type: ignore[attr-defined]
        with self._held(parameter, key) as (begin, held, on_drive):
            own = held[: max(numel - begin, 0)]  # the last pieces may be padded
            if not own.numel():
                return None
            return begin, own.clone() if on_drive else own

    def set(self, parameter: nn.Parameter, value: torch.Tensor, key: str | None) -> None:
        # By our own piece: DeepSpeed's setter of whole tensors fails where the last piece is padded, and
        # its setter of pieces where the model's own weights are on a drive.
        with self._held(parameter, key) as (begin, held, _):
            own = value.flatten()[begin : begin + held.numel()]
            held[: own.numel()].copy_(own)
            held[own.numel() :].zero_()

    @contextmanager
    def _held(self, parameter: nn.Parameter, key: str | None) -> Iterator[tuple[int, torch.Tensor, bool]]:
        """This rank's piece, padding included: its first element's place, its memory, is that on loan?"""
        group, start, piece_numel = self.zero.grad_position[self.zero.get_param_id(parameter)]
        with self._in_memory(group) as on_drive:
            flat = self.zero.fp32_partitioned_groups_flat[group]
            held = flat if key is None else self.optimizer.state[flat][key]
            yield piece_numel * self.engine.global_rank, held.data.narrow(0, start, piece_numel), on_drive

    def publish(self) -> None:
        for group in range(len(self.zero.fp32_partitioned_groups_flat)):
            with self._in_memory(group):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
        kept = self.zero.persistent_parameters  # small ones stay gathered: gather them anew
        if kept:
            kept[0].partition(kept)
        self._drop_second_pieces()
        if kept:
            kept[0].all_gather(kept)

    def _drop_second_pieces(self) -> None:
        """What zero_hpz_partition_size keeps besides, of the weights before; gathering would prefer them.

        DeepSpeed makes them anew. Its own invalidate_secondary_tensor leaves out frozen parameters.
        """
        for parameter in self.engine.module.parameters():
            parameter.ds_secondary_tensor = None

    @contextmanager
    def _in_memory(self, group: int) -> Iterator[bool]:
        """Bring a group's weights and moments from the drive, if that is where they are, and back."""
        on_drive = bool(self.zero._swappable_optimizer_subgroup(group))
        if on_drive:
            self.zero._optimizer_states_and_gradient_swap_in(group)
        yield on_drive
        if on_drive:
            self.zero._optimizer_states_and_gradient_swap_out(group)


def _counted_together(counts: StepCounts) -> str:
    name = min(counts.fewer)
    return (
        f"the checkpoint has {len(counts.fewer)} parameters that were updated fewer times than the others "
        f"({name} {counts.of(name)} times); ZeRO counts the updates of all together: Adam's bias correction "
        f"takes theirs for {counts.most} too"
    )


def shards_of(engine: Any, stage: int) -> Shards:
    return (Replicated, FlatGroups, FlatGroups, Partitioned)[stage](engine)
