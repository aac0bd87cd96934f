"""Makes `sim` a device of torch in this process, and gives the hand-written engine a way onto it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from tests.simulated import autocast, kernels, random
from tests.simulated.counting import DEVICE_COUNT, NAME


class Module:
    """`torch.sim`: what torch looks for on a device's module."""

    _initialized = True
    """torch's checkpointing asks, before it keeps random states."""

    def device(self, index: int) -> AbstractContextManager[None]:
        return random.current(index)

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return DEVICE_COUNT

    def current_device(self) -> int:
        return random.current_index()

    def synchronize(self, device: object = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        random.seed_all(seed)

    def get_rng_state(self, device: int | str | torch.device = NAME) -> torch.Tensor:
        return random.get_state(_index(device))

    def set_rng_state(self, state: torch.Tensor, device: int | str | torch.device = NAME) -> None:
        random.set_state(_index(device), state)


def _index(device: int | str | torch.device) -> int:
    index = device if isinstance(device, int) else torch.device(device).index
    return random.current_index() if index is None else index


_setup_privateuseone_for_python_backend(NAME, Module())
kernels.register()
autocast.register()
