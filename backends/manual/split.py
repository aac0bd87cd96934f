"""How many blocks each device of `manual.devices` gets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xtrain.errors import RequestError
from xtrain.records.summary import format_bytes

from .counts import split_blocks
from .devices import Device
from .estimate import StepBytes

MARGIN = 0.1
"""Share of a device's limit that stays free: for kernels' workspace, a chunk of logits, fragmentation."""


def fit_blocks(needed: StepBytes, devices: Sequence[Device]) -> list[int]:
    """`split: auto`: each device in turn takes as many blocks as fit; one device alone, alike.

    Raises RequestError where stem and head, or some of the blocks, find no room.
    """
    room = {device.torch_device: _room(device) - needed.recomputed for device in devices}
    home = devices[0].torch_device
    room[home] -= needed.home
    if room[home] < 0:
        raise RequestError(f"manual.split: auto: stem and head do not fit on {home}{_short(-room[home])}")
    left, counts = list(needed.blocks), []
    for device in devices:
        count = 0
        while left and left[0] <= room[device.torch_device]:
            room[device.torch_device] -= left.pop(0)
            count += 1
        counts.append(count)
    if left:
        taken = ", ".join(
            f"{count} on {device.torch_device}" for device, count in zip(devices, counts, strict=True)
        )
        raise RequestError(
            f"manual.split: auto: found room for {sum(counts)} of the {len(needed.blocks)} blocks "
            f"({taken}){_short(sum(left))}"
        )
    if len(room) == 1:
        return split_blocks([1 / len(devices)] * len(devices), len(needed.blocks))
    return counts


def _short(missing_bytes: float) -> str:
    """What to do about it."""
    return (
        f"; by the estimate {format_bytes(int(missing_bytes))} are missing: use a smaller batch.micro, "
        "memory.checkpointing or memory.offload, name more devices, or name counts, which are not checked"
    )


def _room(device: Device) -> float:
    limit = device.limit_bytes()
    return math.inf if limit is None else limit * (1 - MARGIN)
