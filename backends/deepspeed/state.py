"""The training state by parameter name: out of DeepSpeed's shards, and back into them.

Each rank gives its own pieces away: a save gathers nothing, and training waits for no other rank (but see
`_frozen`). To load, each takes its pieces out of whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from xtrain.contract import StateForm, StateKey, StateKind, StatePiece, StateReader

from ..moments import MOMENTS, kept_moments
from .shards import Piece, Shards


def state_layout(shards: Shards) -> dict[StateKey, StateForm]:
    """Of the whole state, whatever this rank has of it."""
    layout: dict[StateKey, StateForm] = {}
    for name, parameter in shards.engine.module.named_parameters():
        form = StateForm(tuple(getattr(parameter, "ds_shape", parameter.shape)))
        layout[name, "weight"] = form
        if parameter.requires_grad:
            layout |= {(name, MOMENTS[key]): form for key in shards.moments_of(parameter)}
    for name, buffer in shards.engine.module.named_buffers():
        layout[name, "buffer"] = StateForm(tuple(buffer.shape), str(buffer.dtype).removeprefix("torch."))
    return layout


def export_state(shards: Shards, rank: int, owner: Callable[[str], int]) -> Iterator[StatePiece]:
    """This rank's pieces, where they are."""
    shards.link()
    for name, parameter in shards.engine.module.named_parameters():
        mine = owner(name) == rank
        if not parameter.requires_grad:
            yield from _given(name, "weight", _frozen(parameter, rank, mine))
        elif mine or not shards.replicated:
            yield from _given(name, "weight", shards.piece(parameter, None))
            for key in shards.moments_of(parameter):
                yield from _given(name, MOMENTS[key], shards.piece(parameter, key))
    for name, buffer in shards.engine.module.named_buffers():
        if owner(name) == rank:
            yield StatePiece(name, "buffer", buffer.detach())


@torch.no_grad()
def import_state(shards: Shards, reader: StateReader) -> None:
    """Set weights, buffers and moments on every rank; ValueError names what does not fit."""
    named = dict(shards.engine.module.named_parameters())
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    keys = [
        key
        for key in kept_moments(shards.optimizer)
        if any(reader.read(name, MOMENTS[key]) is not None for name in trained)
    ]
    shards.make_moments(keys)
    for name, parameter in named.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        value = _expect(reader, name, "weight", shape)
        if name not in trained:
            _set_frozen(parameter, value)
            continue
        shards.set(parameter, value, None)
        if all(reader.read(name, MOMENTS[key]) is None for key in keys):
            continue  # never updated: a backend without flat groups has no moments of it; they are zeros here
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


def _given(name: str, kind: StateKind, piece: Piece | None) -> Iterator[StatePiece]:
    if piece is not None:
        begin, values = piece
        yield StatePiece(name, kind, values.detach().float(), begin)


def _frozen(parameter: nn.Parameter, rank: int, mine: bool) -> Piece | None:
    """Stage 3 cuts these up too; what it keeps on a drive is gathered on every rank, and the owner's."""
    if not hasattr(parameter, "ds_shape"):
        return (0, parameter) if mine else None
    from deepspeed.runtime.swap_tensor.partitioned_param_swapper import PartitionedParamStatus
    from deepspeed.runtime.zero import GatheredParameters

    held: Any = parameter.ds_tensor  # type: ignore[attr-defined]
    if held.status != PartitionedParamStatus.AVAILABLE:
        with GatheredParameters([parameter]):
            return (0, parameter.detach().clone()) if mine else None
    begin = rank * held.ds_numel
    own = held[: max(parameter.ds_numel - begin, 0)]  # type: ignore[attr-defined]
    return (begin, own) if own.numel() else None


def _set_frozen(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if not hasattr(parameter, "ds_shape"):
        parameter.copy_(value)
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
