"""The training state by parameter name: out of the engine, and back into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from xtrain.contract import StateForm, StateKey, StateKind, StatePiece, StateReader

from ..moments import MOMENTS, kept_moments
from ..step_counts import StepCounts, counted
from .weights import Weights


def state_layout(
    model: nn.Module, weights: Weights, optimizer: torch.optim.Optimizer
) -> dict[StateKey, StateForm]:
    """Of every tensor that export_state yields."""
    return {
        (piece.name, piece.kind): StateForm(
            tuple(piece.value.shape), str(piece.value.dtype).removeprefix("torch.")
        )
        for piece in export_state(model, weights, optimizer)
    }


def export_state(
    model: nn.Module, weights: Weights, optimizer: torch.optim.Optimizer
) -> Iterator[StatePiece]:
    """Every tensor of the state, one at a time, where it is: a save needs no second copy of them."""
    for name, parameter in model.named_parameters():
        updated = weights.updated.get(name, parameter)
        yield StatePiece(name, "weight", updated.detach().float())
        for key, kind in MOMENTS.items():
            if isinstance(moment := optimizer.state[updated].get(key), torch.Tensor):
                yield StatePiece(name, kind, moment.float())
    for name, buffer in model.named_buffers():
        yield StatePiece(name, "buffer", buffer.detach())


@torch.no_grad()
def import_state(
    model: nn.Module, weights: Weights, optimizer: torch.optim.Optimizer, reader: StateReader
) -> None:
    """Set weights, buffers and moments, and the model's own 16-bit weights after their masters."""
    for name, parameter in model.named_parameters():
        updated = weights.updated.get(name, parameter)
        _set(updated, reader, name, "weight")
        if parameter.requires_grad:
            _set_moments(updated, optimizer, reader, name)
    for name, buffer in model.named_buffers():
        _set(buffer, reader, name, "buffer")
    weights.publish()


def step_counts(weights: Weights, optimizer: torch.optim.Optimizer) -> StepCounts:
    """Updates made so far, as Adam's bias correction counts them (skipped ones are not counted)."""
    return counted(_states(weights, optimizer))


def set_step_counts(weights: Weights, optimizer: torch.optim.Optimizer, counts: StepCounts) -> None:
    """The count beside each parameter's moments, as torch's AdamW keeps it: one fp32 number a tensor."""
    for name, state in _states(weights, optimizer).items():
        if "exp_avg" in state:
            device = weights.updated[name].device if optimizer.defaults.get("fused") else "cpu"
            state["step"] = torch.tensor(float(counts.of(name)), dtype=torch.float32, device=device)


def _states(weights: Weights, optimizer: torch.optim.Optimizer) -> Mapping[str, dict[str, Any]]:
    """By parameter name."""
    return {name: optimizer.state[updated] for name, updated in weights.updated.items()}


def _set_moments(
    updated: torch.Tensor, optimizer: torch.optim.Optimizer, reader: StateReader, name: str
) -> None:
    """Those that this optimizer keeps: all, or none (then it begins anew), whatever else is stored."""
    stored = {key: reader.read(name, MOMENTS[key]) for key in kept_moments(optimizer)}
    if all(moment is None for moment in stored.values()):
        return
    for key in stored:
        optimizer.state[updated][key] = torch.empty_like(updated)
        _set(optimizer.state[updated][key], reader, name, MOMENTS[key])


def _set(tensor: torch.Tensor, reader: StateReader, name: str, kind: StateKind) -> None:
    stored = reader.read(name, kind)
    if stored is None:
        raise ValueError(f"the state has no {kind} of {name}")
    if stored.shape != tensor.shape:
        raise ValueError(f"{kind} of {name}: found {tuple(stored.shape)}, expected {tuple(tensor.shape)}")
    tensor.copy_(stored)
