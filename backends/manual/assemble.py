"""How an engine is put together: the techniques that are decided once, each on top of those before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from xtrain.contract import ModelSource
from xtrain.spec.tree import Spec
from xtrain.techniques.checkpointing import checkpoint_activations
from xtrain.techniques.compiled import compile_model

from .devices import Cpu, Device
from .in_backward import UpdateInBackward
from .optimizer import build_optimizer
from .out_of_memory import watch_memory
from .placement import place, plan_placement
from .precision import round_weights
from .weights import Weights, hold_weights


@dataclass(frozen=True)
class Parts:
    """What a step works with."""

    model: nn.Module
    """Maps (tokens, targets) on the first device to the sum of token losses; each block is in its place."""
    weights: Weights
    optimizer: torch.optim.Optimizer
    in_backward: UpdateInBackward | None
    """Where the spec asks for it: then nobody else updates."""
    notes: Sequence[str]


def assemble(spec: Spec, source: ModelSource, devices: Sequence[Device]) -> Parts:
    """Stem, head and loss on the first device, the blocks over all of them (placement.py).

    Raises RequestError where the spec asks for what this model cannot do, OutOfMemory where it does not fit.
    """
    with watch_memory(devices, "start", dict):
        model = source.build()
    with watch_memory(devices, "start", lambda: {"parameters": model.parameters()}):
        placement = plan_placement(model, spec, devices)
        round_weights(model, spec.precision)  # before they travel: fp32 ones might not fit
        place(model, placement)
        compile_model(model, spec)
        checkpoint_activations(model, spec)
        weights = hold_weights(model, spec.techniques.offload)
    fused = {device.torch_device: device.fused_optimizer for device in (Cpu(), *devices)}
    all_fused = all(fused[p.device] for p in weights.updated.values())
    build = partial(build_optimizer, spec.optimizer, source=source, fused=all_fused)
    optimizer = build(weights.updated)
    in_backward = (
        UpdateInBackward(weights, optimizer, build) if spec.techniques.optimizer_in_backward else None
    )
    return Parts(model, weights, optimizer, in_backward, placement.notes())
