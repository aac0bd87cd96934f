"""How many blocks each device of `manual.devices` gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from xtrain.errors import RequestError

from .devices import Device
from .estimate import StepBytes

MARGIN = 0.1
"""Share of a device's limit that stays free: for kernels' workspace, a chunk of logits, fragmentation."""


def split_blocks(split: Sequence[int] | Sequence[float], blocks: int) -> list[int]:
    """Counts from `manual.split`: counts, which must sum to the model's blocks, or fractions of them."""
    counts = [part for part in split if isinstance(part, int)]
    if len(counts) < len(split):
        ends = [0, *(round(math.fsum(split[: place + 1]) * blocks) for place in range(len(split)))]
        return [end - start for start, end in pairwise(ends)]
    if sum(counts) != blocks:
        raise RequestError(
            f"manual.split: found {counts}, which sum to {sum(counts)}, expected counts that sum to the "
            f"{blocks} blocks of the model; or use split: auto"
        )
    return counts


def fit_blocks(needed: StepBytes, devices: Sequence[Device]) -> list[int]:
    """`split: auto`: each device in turn takes as many blocks as fit, the last one what is left.

    A device without a limit, such as the CPU, takes all that come to it; where none has one, all get alike.
    """
    if all(device.limit_bytes() is None for device in devices):
        return split_blocks([1 / len(devices)] * len(devices), len(needed.blocks))
    room = {device.torch_device: _room(device) for device in devices}
    room[devices[0].torch_device] -= needed.home + needed.recomputed
    left = list(needed.blocks)
    counts = []
    for device in devices[:-1]:
        count = 0
        while left and left[0] <= room[device.torch_device]:
            room[device.torch_device] -= left.pop(0)
            count += 1
        counts.append(count)
    return [*counts, len(left)]


def _room(device: Device) -> float:
    limit = device.limit_bytes()
    return math.inf if limit is None else limit * (1 - MARGIN)
