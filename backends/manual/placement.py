"""Layer sharding: the blocks of one model over several devices, in order.

Stem and head stay on the first device, the home: in most models they share the token embedding. Each
block's weights move to its device, so that its gradients and its optimizer's state come to be there
too. A hidden state is copied where two neighbours are on different devices, and its gradient back the
same way: once for each boundary and pass. Only one device works at a time; what is won is room.

The model's own code is not changed: hooks on the blocks bring their arguments to them. A group of
recomputed blocks may lie across a boundary: what it keeps of a block is what the hook has brought, so its
replay copies nothing (xtrain/techniques/recompute.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from xtrain.errors import RequestError
from xtrain.models.blocks import find_blocks
from xtrain.spec.tree import Spec

from .chain import check_chain
from .counts import split_blocks
from .devices import Device
from .estimate import estimate_bytes
from .split import fit_blocks


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model are to be."""

    home: torch.device
    """Of everything that is in no block."""
    blocks: Sequence[nn.Module] = ()
    places: Sequence[torch.device] = ()
    """Of each block."""

    def notes(self) -> list[str]:
        """For people; nothing where all is on one device anyway."""
        if not self.places:
            return []
        runs = [(device, len(list(members))) for device, members in groupby(self.places)]
        blocks = ", ".join(f"{count} on {device}" for device, count in runs)
        return [f"layers over devices: stem and head on {self.home}; of {len(self.places)} blocks {blocks}"]


def plan_placement(model: nn.Module, spec: Spec, devices: Sequence[Device]) -> Placement:
    """For a model that is on the CPU, in fp32. Nothing of it is changed, but random numbers may be drawn.

    Raises RequestError where its blocks cannot be found, do not chain, or cannot be split like that.
    """
    home = devices[0].torch_device
    if len(devices) == 1:
        return Placement(home)
    blocks = find_blocks(model, spec.model.blocks, "manual.devices")
    if len(devices) > len(blocks):
        raise RequestError(
            f"manual.devices: found {len(devices)}, expected at most one device for each of the "
            f"{len(blocks)} blocks of the model"
        )
    check_chain(model, blocks, spec.data.seq_len)
    split = spec.manual.split if spec.manual else "auto"
    if split == "auto":
        counts = fit_blocks(estimate_bytes(model, blocks, spec), devices)
    else:
        counts = split_blocks(split, len(blocks))
    places = [
        device.torch_device for device, count in zip(devices, counts, strict=True) for _ in range(count)
    ]
    return Placement(home, blocks, places)


def place(model: nn.Module, placement: Placement) -> None:
    """Move every parameter and buffer to its place, each once, and let the blocks fetch their arguments."""
    where = {id(tensor): placement.home for tensor in _outside(model, placement.blocks)}
    for number, (block, device) in enumerate(zip(placement.blocks, placement.places, strict=True)):
        for tensor in (*block.parameters(), *block.buffers()):
            if (other := where.setdefault(id(tensor), device)) != device:
                raise RequestError(
                    f"manual.split: found block {number} on {device}, but it shares a parameter with a part "
                    f"of the model on {other}; expected both on one device; use manual.devices: [main]"
                )
    _move(model, where)
    _cross_boundaries(placement)


@torch.no_grad()
def _move(model: nn.Module, where: Mapping[int, torch.device]) -> None:
    """Each tensor to the device that stands under its id. Tied ones stay one: nn.Module.to may make two."""
    moved: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            for name, tensor in slots.items():
                if tensor is not None and tensor.device != where[id(tensor)]:
                    if id(tensor) not in moved:
                        moved[id(tensor)] = _on(where[id(tensor)], tensor)
                    slots[name] = moved[id(tensor)]  # type: ignore[assignment]


def _on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    there = tensor.to(device)
    return nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there


def _outside(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[torch.Tensor]:
    """Parameters and buffers of the modules that are in no block."""
    inside = {id(module) for block in blocks for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside:
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)


def _cross_boundaries(placement: Placement) -> None:
    """Hooks that bring what a block is called with to its place, and the last block's output home."""
    pairs = zip(placement.blocks, placement.places, strict=True)
    for device, members in groupby(pairs, key=lambda pair: pair[1]):
        neighbours = [block for block, _ in members]
        arguments = Arguments(device)
        for block in neighbours:
            block.register_forward_pre_hook(arguments.bring, with_kwargs=True)
        neighbours[-1].register_forward_hook(arguments.forget)
    if placement.blocks:
        placement.blocks[-1].register_forward_hook(
            lambda block, args, output: tree_map_only(torch.Tensor, lambda t: t.to(placement.home), output)
        )


class Arguments:
    """What neighbouring blocks on one device are called with.

    What the model passes to each of them (masks, rotary tables) is copied once for all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copies = WeakTensorKeyDictionary()
        """By the original, as long as it lives: its version, and the copy."""

    def bring(self, block: nn.Module, args: Any, kwargs: Any) -> Any:
        """A forward pre-hook of every block."""
        return tree_map_only(torch.Tensor, self._here, (args, kwargs))

    def forget(self, block: nn.Module, args: Any, output: Any) -> None:
        """A forward hook of the last block: a copy is part of one pass's graph."""
        self.copies = WeakTensorKeyDictionary()

    def _here(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == self.device:
            return tensor
        version, copy = self.copies.get(tensor, (None, tensor))
        if version != tensor._version:
            copy = tensor.to(self.device)
            self.copies[tensor] = tensor._version, copy
        found: torch.Tensor = copy
        return found
