"""The hand-written engine's way onto the simulated device: the same code as for `mps`, another name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tests.simulated import device as _makes_the_device  # noqa: F401
from tests.simulated.counting import MEMORY, NAME, TRAFFIC
from xtrain import registry
from xtrain.contract import JSON, Availability, Backend, Counter

if TYPE_CHECKING:
    from backends.manual.devices import Device
else:  # as the registry knows it: one copy of the table
    Device = importlib.import_module("xtrain.backends.manual.devices").Device

_devices: Any = importlib.import_module("xtrain.backends.manual.devices")


class Simulated(Device):
    """Looks like an Apple GPU to the engine, but has a peak counter."""

    asynchronous = True
    fused_optimizer = True

    def __init__(self, index: int = 0) -> None:
        self.memory = MEMORY[index]
        self.torch_device = torch.device(NAME, index)

    def probe(self) -> Availability:
        return Availability(True, "simulated, for tests")

    def synchronize(self) -> None:
        pass

    def live(self) -> Counter | None:
        return Counter(self.memory.live_bytes, self.memory.peak_bytes, "counter")

    def reserved(self) -> Counter | None:
        return None

    def limit_bytes(self) -> int | None:
        return self.memory.limit_bytes

    def random_state(self) -> dict[str, JSON]:
        return {**super().random_state(), NAME: _devices._encode(torch.sim.get_rng_state())}  # type: ignore[attr-defined]

    def set_random_state(self, state: Mapping[str, str]) -> None:
        super().set_random_state(state)
        if NAME in state:
            torch.sim.set_rng_state(_devices._decode(state[NAME]))  # type: ignore[attr-defined]


@contextmanager
def simulated_backend() -> Iterator[Backend]:
    """The manual backend on `sim:0`, with fresh counts; the table of devices is put back afterwards."""
    _devices.DEVICES[NAME] = Simulated
    TRAFFIC.clear()
    for memory in MEMORY:
        memory.limit_bytes = None
        memory.reset_peak()
    try:
        with usual_torch():
            yield type(registry.load("cpu"))(NAME)  # type: ignore[call-arg]
    finally:
        del _devices.DEVICES[NAME]


@contextmanager
def usual_torch() -> Iterator[None]:
    """Makes up for where torch treats a device that was added from Python unlike a built-in one.

    Moving a module would untie its tied parameters. The backward pass stays in this thread: torch would
    start one for device 0 and fail for others.
    """
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)
