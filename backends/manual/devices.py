"""The three kinds of device, and the few things in which they differ."""

from __future__ import annotations

import platform
from abc import ABC, abstractmethod

import torch

from xtrain.contract import Availability, Counter


class Device(ABC):
    """What the engine needs to know of a device."""

    torch_device: torch.device
    asynchronous: bool
    fused_optimizer: bool
    """Whether torch has a fused AdamW for it."""

    @abstractmethod
    def probe(self) -> Availability: ...

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def live(self) -> Counter | None:
        """Bytes in live tensors."""

    @abstractmethod
    def reserved(self) -> Counter | None:
        """Bytes the allocator or driver holds."""

    def supports_bf16(self) -> bool:
        return True

    def is_out_of_memory(self, error: RuntimeError) -> bool:
        return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


class Cpu(Device):
    """Synchronous; its allocator keeps no counters, so memory is known by category and as RSS."""

    torch_device = torch.device("cpu")
    asynchronous = False
    fused_optimizer = True

    def probe(self) -> Availability:
        threads = torch.get_num_threads()
        reason = f"{platform.machine()}, {threads} thread{'s' if threads != 1 else ''}"
        return Availability(True, reason, preference=10)

    def synchronize(self) -> None:
        pass

    def live(self) -> Counter | None:
        return None

    def reserved(self) -> Counter | None:
        return None

    def is_out_of_memory(self, error: RuntimeError) -> bool:
        return "can't allocate memory" in str(error) or super().is_out_of_memory(error)


class Cuda(Device):
    torch_device = torch.device("cuda", 0)
    asynchronous = True
    fused_optimizer = True

    def probe(self) -> Availability:
        if not torch.cuda.is_available():
            built = "no NVIDIA GPU found" if torch.version.cuda else "this torch is built without CUDA"
            return Availability(False, built)
        gpu = torch.cuda.get_device_properties(0)
        return Availability(True, f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB", preference=30)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def live(self) -> Counter | None:
        now, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return Counter(now, peak, "counter")

    def reserved(self) -> Counter | None:
        now, peak = torch.cuda.memory_reserved(), torch.cuda.max_memory_reserved()
        return Counter(now, peak, "counter")

    def supports_bf16(self) -> bool:
        return torch.cuda.is_bf16_supported(including_emulation=False)


class Mps(Device):
    """Apple GPUs. There is no peak counter: peaks are sampled on traced steps (xtrain/trace.py)."""

    torch_device = torch.device("mps")
    asynchronous = True
    fused_optimizer = True

    def probe(self) -> Availability:
        if not torch.backends.mps.is_built():
            return Availability(False, "this torch is built without MPS (Apple GPUs)")
        if not torch.backends.mps.is_available():
            return Availability(False, "no Apple GPU, or macOS older than 14")
        limit = torch.mps.recommended_max_memory()
        return Availability(True, f"Apple GPU, working set up to {limit / 2**30:.0f} GiB", preference=20)

    def synchronize(self) -> None:
        torch.mps.synchronize()

    def live(self) -> Counter | None:
        return Counter(torch.mps.current_allocated_memory(), None, "unavailable")

    def reserved(self) -> Counter | None:
        return Counter(torch.mps.driver_allocated_memory(), None, "unavailable")

    def supports_bf16(self) -> bool:
        return torch.backends.mps.is_macos_or_newer(14, 0)


DEVICES: dict[str, type[Device]] = {"cpu": Cpu, "cuda": Cuda, "mps": Mps}


def device_of(name: str) -> Device:
    return DEVICES[name]()
