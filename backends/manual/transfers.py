"""Copies between a device and the CPU: on CUDA beside the computation, elsewhere at once.

On CUDA a copy runs on a stream of its own, from and to pinned memory; otherwise the host would wait for it.
What it reads or writes on the device is the computation's memory, and is held until the computation waits for
the copy, or it is over. (`record_stream` gives such memory back when the host asks for more and finds the
copy over. But the host is ahead, by up to a whole pass: every tensor would get new memory.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

HOST = torch.device("cpu")
UNDERWAY = 8
"""Copies of a device that are not over before its computation waits for the first of them."""


class Lane:
    """One CUDA device's copies from and to the CPU, one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.held: dict[torch.cuda.Event, torch.Tensor] = {}
        """What copies still read or write on the device, in their order, by what is recorded after each."""

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Begin to copy all of `source`, once what was computed so far is there, to `target`."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
            done: torch.cuda.Event = self.stream.record_event()
        self.held[done] = source if target.device == HOST else target
        self.let_go()
        return done

    def wait_for(self, done: torch.cuda.Event) -> None:
        """What is computed from here on comes after that copy; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(done)
        self.held.pop(done, None)

    def let_go(self) -> None:
        """Of what copies are done with; and with too many underway, of the first ones, after a wait."""
        for done in list(self.held):
            if done.query():
                del self.held[done]
            elif len(self.held) > UNDERWAY:
                self.wait_for(done)
            else:
                break


lane_of = cache(Lane)
"""Of a device: its only one."""


@dataclass(frozen=True)
class ToHost:
    """A copy on its way to the CPU."""

    tensor: torch.Tensor
    lane: Lane | None = None
    arrived: torch.cuda.Event | None = None

    def done(self) -> bool:
        return self.arrived is None or self.arrived.query()

    def result(self) -> torch.Tensor:
        """Waits for it on the host."""
        if self.lane is not None and self.arrived is not None:
            self.arrived.synchronize()
            self.lane.let_go()
        return self.tensor


@dataclass(frozen=True)
class ToDevice:
    """A copy on its way from the CPU."""

    tensor: torch.Tensor
    lane: Lane | None = None
    arrived: torch.cuda.Event | None = None

    def result(self) -> torch.Tensor:
        """What is computed from here on waits for it; the host does not."""
        if self.lane is not None and self.arrived is not None:
            self.lane.wait_for(self.arrived)
        return self.tensor


def overlaps(device: torch.device) -> bool:
    """Whether a copy from or to it can run beside the computation."""
    return device.type == "cuda"


def to_host(tensor: torch.Tensor) -> ToHost:
    """Begin to copy `tensor`, which must not be modified any more."""
    if not overlaps(tensor.device):
        return ToHost(tensor.to(HOST))
    copy = pinned_like(tensor)
    if copy.stride() != tensor.stride():  # a part of something wider: no single piece of memory
        tensor = torch.empty_like(copy, device=tensor.device).copy_(tensor)
    lane = lane_of(tensor.device)
    return ToHost(copy, lane, lane.copy(tensor, copy))


def to_device(sent: ToHost, device: torch.device) -> ToDevice:
    """Begin to copy back what was sent from there: in the same lane, so after it has arrived."""
    if not overlaps(device):
        return ToDevice(sent.tensor.to(device))
    copy, lane = torch.empty_like(sent.tensor, device=device), lane_of(device)
    return ToDevice(copy, lane, lane.copy(sent.tensor, copy))


def copy_over(source: torch.Tensor, target: torch.Tensor) -> None:
    """`target`'s numbers become `source`'s, rounded to its format.

    From the CPU to CUDA they are rounded first and sent from pinned memory: half the bytes, and the host does
    not wait. What was pinned goes back to torch's pool of it once the copy is done.
    """
    if source.device == HOST and overlaps(target.device):
        target.copy_(pinned_like(target).copy_(source), non_blocking=True)
    else:
        target.copy_(source)


def pinned_like(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of the CPU that a CUDA device copies from and to by itself."""
    return torch.empty_like(tensor, device=HOST, pin_memory=True)
