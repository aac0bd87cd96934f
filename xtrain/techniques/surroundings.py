"""What a block's result depends on beside its arguments and weights: random states and autocast."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Surroundings:
    """As they were at one moment, for the host and for the devices of some tensors."""

    random: Mapping[torch.device, torch.Tensor]
    autocast: Mapping[str, torch.dtype | None]
    """By kind of device; None where it was off."""
    autocast_cache: bool

    @classmethod
    def now(cls, tensors: Sequence[torch.Tensor]) -> Surroundings:
        devices = {HOST, *(tensor.device for tensor in tensors)}
        kinds = {device.type for device in devices if torch.amp.is_autocast_available(device.type)}
        dtypes = {
            kind: torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in kinds
        }
        return cls(_random_states(devices), dtypes, torch.is_autocast_cache_enabled())

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As they were then; afterwards randomness goes on as if nothing had been drawn in between."""
        before = _random_states(self.random)
        _set_random_states(self.random)
        try:
            with ExitStack() as stack:
                for kind, dtype in self.autocast.items():
                    enabled = dtype is not None
                    stack.enter_context(
                        torch.autocast(kind, dtype, enabled, cache_enabled=self.autocast_cache)
                    )
                yield
        finally:
            _set_random_states(before)


def _random_states(devices: Iterable[torch.device]) -> dict[torch.device, torch.Tensor]:
    """The state of each device's generator; a device without one of its own is left out."""
    states = {}
    for device in devices:
        if device == HOST:
            states[device] = torch.get_rng_state()
        elif hasattr(module := torch.get_device_module(device), "get_rng_state"):
            states[device] = module.get_rng_state(device)
    return states


def _set_random_states(states: Mapping[torch.device, torch.Tensor]) -> None:
    for device, state in states.items():
        if device == HOST:
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
