"""What a training step needs, block by block: for `manual.split: auto`, before anything is on a device.

Two parts. What follows from the weights is counted: weights, gradients, masters and moments. What the
backward pass needs is measured: one sequence goes forward through the model on the CPU in fp32, and
every tensor that autograd keeps is put down to the block that was running. Activations grow with the
sequences of a micro-batch, and halve with 16-bit weights.

It errs on the side of too much: under autocast much of what is kept has 16 bits, and kernels for
attention on a GPU may keep less than the CPU's. Not seen are a kernel's workspace, the chunked loss's own
buffers, and what lives only within the forward pass of one module.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from xtrain.spec.tree import AdamW, Spec
from xtrain.techniques.checkpointing import groups, recomputes

from ..dtypes import DTYPES
from .chain import try_sequence


@dataclass(frozen=True)
class StepBytes:
    """Bytes in use at the height of one step."""

    blocks: Sequence[int]
    """Of each block: its state, and what it keeps for the backward pass."""
    home: int
    """Of all that is in no block."""
    recomputed: int
    """Of the largest group of recomputed blocks, while the backward pass is in it."""


def estimate_bytes(model: nn.Module, blocks: Sequence[nn.Module], spec: Spec) -> StepBytes:
    """For a model on the CPU in fp32. Draws from torch's generator where the model has dropout."""
    kept = KeptBytes(model, blocks)
    kept.measure(spec.data.seq_len)
    scale = spec.micro_batch * DTYPES[spec.precision.weights].itemsize / torch.float32.itemsize
    in_backward, recomputed = list(kept.inside), 0
    for group in _recomputed_groups(spec, len(blocks)):
        recomputed = max(recomputed, sum(kept.inside[place] for place in group))
        for place in group:
            in_backward[place] = kept.inputs[place]
    if spec.techniques.offload.activations.enabled:
        in_backward = [0] * len(blocks)
    state = [state_bytes(block.parameters(), spec) for block in blocks]
    return StepBytes(
        [fixed + int(scale * varying) for fixed, varying in zip(state, in_backward, strict=True)],
        state_bytes(model.parameters(), spec) - sum(state) + int(scale * kept.outside),
        int(scale * recomputed),
    )


def state_bytes(parameters: Iterable[nn.Parameter], spec: Spec) -> int:
    """Weights, gradients, moments, and where the weights have 16 bits also masters, at their most."""
    weight = DTYPES[spec.precision.weights].itemsize
    if spec.techniques.offload.optimizer.enabled:
        trained = 0 if spec.techniques.offload.gradients.enabled else weight
    else:
        trained = 4 + _optimizer_bytes(spec)  # at the update a gradient has 32 bits, whatever the weight has
    return sum(p.numel() * (weight + (trained if p.requires_grad else 0)) for p in parameters)


def _optimizer_bytes(spec: Spec) -> int:
    """Of one parameter's moments and master copy."""
    master = 0 if spec.precision.weights == "fp32" else 4
    if isinstance(spec.optimizer, AdamW):
        return master + 8
    return master + (4 if spec.optimizer.momentum else 0)


def _recomputed_groups(spec: Spec, blocks: int) -> Sequence[Sequence[int]]:
    """Empty where only the cheap operations are recomputed: what is kept then is most of it."""
    if not recomputes(spec):
        return []
    chosen = spec.techniques.checkpointing
    return [] if chosen.selective and chosen.selective.ops else groups(chosen, blocks)


class KeptBytes:
    """Bytes that autograd keeps for one sequence: inside each block, its inputs, and outside of all."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model, self.blocks = model, blocks
        self.inside = [0] * len(blocks)
        self.inputs = [0] * len(blocks)
        self.outside = 0
        self.running: int | None = None
        """The block whose forward pass this is."""
        self.seen = {
            tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())
        }

    def measure(self, seq_len: int) -> None:
        hooks = [
            hook
            for place, block in enumerate(self.blocks)
            for hook in (
                block.register_forward_pre_hook(partial(self._enter, place), with_kwargs=True),
                block.register_forward_hook(self._leave),
            )
        ]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor):
                try_sequence(self.model, seq_len)
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, place: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        self.running = place
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.inputs[place] = sum(tensor.nbytes for tensor in tensors if tensor.requires_grad)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.running = None

    def _count(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            if self.running is None:
                self.outside += storage.nbytes()
            else:
                self.inside[self.running] += storage.nbytes()
        return tensor.detach()  # alive, so that no other gets its address, but not a part of the graph
