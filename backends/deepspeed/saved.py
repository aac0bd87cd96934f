"""What autograd keeps from the forward to the backward pass: weights by name, the rest here or on the CPU.

A matrix product keeps a view of its weight. At stage 3 DeepSpeed gives a gathered weight up by pointing the
parameter elsewhere, and the view would hold the memory all the same: at the end of a forward pass the whole
model would be there. DeepSpeed's own remedy, `memory_efficient_linear`, exchanges torch's linear in the whole
process and changes what autocast computes. Here a pair of hooks keeps the parameter and the form of the view;
when the backward pass asks for it, DeepSpeed has gathered it again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ..strides import laid_out

HOST = torch.device("cpu")


def keeping(stage: int, on_host: bool, keeps_strides: bool) -> AbstractContextManager[object]:
    """Around one forward pass; `on_host` sends what autograd keeps to the CPU, all but weights.

    `keeps_strides` for compiled code (strides.py).
    """
    if stage < 3 and not on_host:
        return nullcontext()
    return saved_tensors_hooks(partial(_send, keeps_stride=keeps_strides) if on_host else _keep, _again)


def _keep(tensor: torch.Tensor) -> torch.Tensor | Weight:
    whole = _whole(tensor)
    if not hasattr(whole, "ds_id"):
        return tensor.detach()  # an operation's own result, kept itself, would keep its node alive for ever
    offset = int(tensor.storage_offset() - whole.storage_offset())
    return Weight(whole, tensor.shape, tensor.stride(), offset)


def _send(tensor: torch.Tensor, keeps_stride: bool) -> torch.Tensor | Weight | OnHost:
    if isinstance(_whole(tensor), nn.Parameter) or tensor.device == HOST:
        return _keep(tensor)
    return OnHost(_copied(tensor.detach(), HOST), tensor.device, tensor.stride() if keeps_stride else None)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """What this is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def _again(kept: torch.Tensor | Weight | OnHost) -> torch.Tensor:
    return kept if isinstance(kept, torch.Tensor) else kept.again()


@dataclass(frozen=True)
class Weight:
    """A parameter, or a view of it, wherever its elements are by then."""

    parameter: torch.Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def again(self) -> torch.Tensor:
        whole = self.parameter.detach()
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


@dataclass(frozen=True)
class OnHost:
    """A tensor that was sent to the CPU from `device`."""

    copy: torch.Tensor
    device: torch.device
    stride: tuple[int, ...] | None

    def again(self) -> torch.Tensor:
        return laid_out(_copied(self.copy, self.device), self.stride)


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On `device`, in order with what is computed there; through pinned memory the host need not wait."""
    pinned = torch.cuda.is_available() and device == HOST
    copy = torch.empty_like(tensor, device=device, pin_memory=pinned)
    return copy.copy_(tensor, non_blocking=torch.cuda.is_available())
