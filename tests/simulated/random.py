"""Each simulated device has its own random numbers, as a GPU has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.simulated.counting import DEVICE_COUNT

_generators = [torch.Generator() for _ in range(DEVICE_COUNT)]

_current = 0


def current_index() -> int:
    return _current


@contextmanager
def current(index: int) -> Iterator[None]:
    """What torch means by a device without an index."""
    global _current
    before, _current = _current, index
    try:
        yield
    finally:
        _current = before


def seed_all(seed: int) -> None:
    for generator in _generators:
        generator.manual_seed(seed)


def get_state(index: int) -> torch.Tensor:
    return _generators[index].get_state()


def set_state(index: int, state: torch.Tensor) -> None:
    _generators[index].set_state(state)


@contextmanager
def own_state(op: Any, index: int) -> Iterator[None]:
    """While an operation draws, it draws from the device's generator, and the CPU's stays as it is."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        yield
        return
    host = torch.get_rng_state()
    torch.set_rng_state(_generators[index].get_state())
    try:
        yield
    finally:
        _generators[index].set_state(torch.get_rng_state())
        torch.set_rng_state(host)
