"""A full device: torch says so in a different way for each kind, the loop knows one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from xtrain.contract import Holdings, Memory, Moment, OutOfMemory
from xtrain.measure.ledger import count_bytes

from .devices import Cpu, Device


@contextmanager
def watch_memory(
    devices: Sequence[Device], moment: Moment, holdings: Callable[[], Holdings]
) -> Iterator[None]:
    """Raises OutOfMemory, with what `holdings` tells, where one of `devices` or the host is full."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = next((device for device in (*devices, Cpu()) if device.is_out_of_memory(error)), None)
        if full is None:
            raise
        raise OutOfMemory(str(full.torch_device), memory_of(full, holdings()), moment) from error


def memory_of(device: Device, holdings: Holdings) -> Memory:
    """What `device` holds now; of `holdings`, only what is there counts."""
    categories = count_bytes(holdings).get(str(device.torch_device), {})
    return Memory(device.live(), device.reserved(), categories)
