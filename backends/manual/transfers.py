"""Copies between a device and the CPU: on CUDA beside the computation, elsewhere at once.

On CUDA a copy runs on a stream of its own, from and to pinned memory; otherwise the host would wait for it.
`record_stream` tells the allocator that the other stream still reads memory that this one has let go of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

HOST = torch.device("cpu")


@dataclass(frozen=True)
class ToHost:
    """A copy on its way to the CPU."""

    tensor: torch.Tensor
    arrived: torch.cuda.Event | None = None

    def done(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def result(self) -> torch.Tensor:
        """Waits for it on the host."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor


@dataclass(frozen=True)
class ToDevice:
    """A copy on its way from the CPU."""

    tensor: torch.Tensor
    arrived: torch.cuda.Event | None = None

    def result(self) -> torch.Tensor:
        """What is computed from here on waits for it; the host does not."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.arrived)
            self.tensor.record_stream(stream)
        return self.tensor


def overlaps(device: torch.device) -> bool:
    """Whether a copy from or to it can run beside the computation."""
    return device.type == "cuda"


def to_host(tensor: torch.Tensor) -> ToHost:
    """Begin to copy `tensor`, which must not be modified any more."""
    if not overlaps(tensor.device):
        return ToHost(tensor.to(HOST))
    stream = side_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        copy = torch.empty_like(tensor, device=HOST, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        arrived = stream.record_event()
    tensor.record_stream(stream)
    return ToHost(copy, arrived)


def to_device(sent: ToHost, device: torch.device) -> ToDevice:
    """Begin to copy back what was sent from there: on the same stream, so after it has arrived."""
    if not overlaps(device):
        return ToDevice(sent.tensor.to(device))
    stream = side_stream(device)
    with torch.cuda.stream(stream):
        copy = sent.tensor.to(device, non_blocking=True)
        return ToDevice(copy, stream.record_event())


def copy_over(source: torch.Tensor, target: torch.Tensor) -> None:
    """`target`'s numbers become `source`'s, rounded to its format.

    From the CPU to CUDA they are rounded first and sent from pinned memory: half the bytes, and the host does
    not wait. What was pinned goes back to torch's pool of it once the copy is done.
    """
    if source.device == HOST and overlaps(target.device):
        narrow = torch.empty_like(target, device=HOST, pin_memory=True)
        target.copy_(narrow.copy_(source), non_blocking=True)
    else:
        target.copy_(source)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
