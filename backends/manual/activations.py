"""Activations on the CPU between the forward and the backward pass.

Autograd offers every tensor that it saves to a pair of hooks (torch.autograd.graph.saved_tensors_hooks). Here
the first sends it to the CPU, the second brings it back when the backward pass asks for it. Weights stay
where they are: they are on the device anyway. With recomputed blocks, what autograd saves is what those
keep: the inputs of a group (xtrain/techniques/recompute.py).

On CUDA a tensor is fetched before it is asked for: the backward pass asks in nearly the reverse order.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from ..strides import laid_out
from .transfers import HOST, ToDevice, overlaps, to_device, to_host

AHEAD = 4
"""Tensors that are on their way back before they are asked for."""


@contextmanager
def activations_on_host(model: nn.Module, keeps_strides: bool) -> Iterator[None]:
    """Around one forward pass; `keeps_strides` for compiled code (strides.py)."""
    current = Pass(model, keeps_strides)
    with saved_tensors_hooks(current.park, current.fetch):
        yield


class Parked:
    """One tensor that autograd saved, on the CPU."""

    def __init__(self, place: int, tensor: torch.Tensor, keeps_stride: bool) -> None:
        self.place = place
        self.device = tensor.device
        self.stride = tensor.stride() if keeps_stride else None
        self.sent = to_host(tensor.detach())
        self.coming: ToDevice | None = None

    def send_for(self) -> None:
        if self.coming is None:
            self.coming = to_device(self.sent, self.device)

    def back(self) -> torch.Tensor:
        self.send_for()
        assert self.coming is not None
        tensor, self.coming = self.coming.result(), None
        return laid_out(tensor, self.stride)


class Pass:
    """One forward pass, and the backward pass that belongs to it."""

    def __init__(self, model: nn.Module, keeps_strides: bool) -> None:
        self.keeps_strides = keeps_strides
        self.stay = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.parked: list[weakref.ref[Parked]] = []  # weak: one dies when its node of the graph is done
        self.known: dict[object, weakref.ref[Parked]] = {}
        """A tensor that several operations save is parked once."""
        self.storages: dict[int, StorageWeakRef] = {}
        """As long as there is such a reference, no other storage has the same number."""

    def park(self, tensor: torch.Tensor) -> torch.Tensor | Parked:
        storage = tensor.untyped_storage()
        if tensor.device == HOST or storage._cdata in self.stay:
            return tensor.detach()  # itself, an operation's own result would keep its node alive for ever
        self.storages.setdefault(storage._cdata, StorageWeakRef(storage))
        form = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
        key = storage._cdata, form, tensor._version
        known = self.known.get(key)
        if known is None or (parked := known()) is None:
            parked = Parked(len(self.parked), tensor, self.keeps_strides)
            self.parked.append(weakref.ref(parked))
            self.known[key] = self.parked[-1]
        return parked

    def fetch(self, saved: torch.Tensor | Parked) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        tensor = saved.back()
        if overlaps(saved.device):
            for before in self.parked[max(0, saved.place - AHEAD) : saved.place]:
                if (parked := before()) is not None:
                    parked.send_for()
        return tensor
