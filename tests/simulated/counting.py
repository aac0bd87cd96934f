"""What the simulated devices count: bytes alive, the most there were, and every copy to and from them."""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass, field

import torch

NAME = "sim"
DEVICE_COUNT = 2


@dataclass
class Copies:
    count: int = 0
    bytes: int = 0


@dataclass
class DeviceMemory:
    """One device's memory; set `limit_bytes` to make it run out."""

    index: int
    live_bytes: int = 0
    peak_bytes: int = 0
    limit_bytes: int | None = None

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a new storage until it is freed; OutOfMemoryError where it does not fit."""
        size = storage.nbytes()
        if self.limit_bytes is not None and self.live_bytes + size > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"{NAME}:{self.index} is out of memory: {size} bytes wanted, "
                f"{self.live_bytes} of {self.limit_bytes} in use"
            )
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._release, size).atexit = False

    def reset_peak(self) -> None:
        self.peak_bytes = self.live_bytes

    def _release(self, size: int) -> None:
        self.live_bytes -= size


@dataclass
class Traffic:
    """Copies by (from, to), such as ("cpu", "sim:0"), and how often the host waited for one number."""

    copies: defaultdict[tuple[str, str], Copies] = field(default_factory=lambda: defaultdict(Copies))
    numbers_read: int = 0

    def crossed(self, source: torch.device, target: torch.device, size: int) -> None:
        copies = self.copies[str(source), str(target)]
        copies.count += 1
        copies.bytes += size

    def clear(self) -> None:
        self.copies.clear()
        self.numbers_read = 0


MEMORY = [DeviceMemory(index) for index in range(DEVICE_COUNT)]
TRAFFIC = Traffic()
