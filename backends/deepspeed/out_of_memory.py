"""A full device, or a full host: what DeepSpeed's process held when it was told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from xtrain.contract import Counter, Holdings, Memory, Moment, OutOfMemory
from xtrain.measure.ledger import count_bytes

from ..full import full_place


@contextmanager
def watch_memory(device: torch.device, moment: Moment, held: Callable[[], Holdings]) -> Iterator[None]:
    """Raises OutOfMemory, with what is `held`, where `device` or the host is full."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = full_place(error, device)
        if full is None:
            raise
        raise OutOfMemory(full, memory_of(torch.device(full), held()), moment) from error


def memory_of(device: torch.device, holdings: Holdings) -> Memory:
    live = reserved = None
    if device.type == "cuda":
        live = Counter(torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), "counter")
        reserved = Counter(torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved(), "counter")
    return Memory(live, reserved, count_bytes(holdings).get(str(device), {}))
