"""For the planner: where this engine keeps what, as far as that follows from the spec alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtrain.models.presets import dimensions
from xtrain.plan.layout import DEVICE, HOST
from xtrain.plan.places import Places
from xtrain.spec.tree import Offload

from .counts import split_blocks
from .support import device_names

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec


def layout_of(spec: Spec, main: str) -> Places | None:
    """None where `split: auto` looks at the model and at what is free on each device.

    As long as the device has no name, nothing is known of what is free: then all get alike.
    """
    home, *others = names = [_as_torch_says(name) for name in device_names(spec, main)]
    offload = spec.techniques.offload if home != HOST or set(others) - {HOST} else Offload()
    at_once = spec.techniques.optimizer_in_backward
    if set(names) == {home}:
        return Places(home, offload=offload, updates_in_backward=at_once)
    split = spec.manual.split if spec.manual else "auto"
    if spec.model.preset is None or (split == "auto" and main != DEVICE):
        return None
    shares = [1 / len(names)] * len(names) if split == "auto" else split
    counts = split_blocks(shares, dimensions(spec).layers)
    blocks = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
    return Places(home, blocks, offload, at_once)


def _as_torch_says(name: str) -> str:
    """ "cuda" is "cuda:0" in a record."""
    return name if name in (HOST, DEVICE) or ":" in name else f"{name}:0"
