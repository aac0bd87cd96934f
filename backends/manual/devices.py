"""The kinds of device, and the few things in which they differ."""

from __future__ import annotations

import base64
import os
import platform
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import psutil
import torch

from xtrain.allocator import keep_freed_memory
from xtrain.contract import JSON, Availability, Counter
from xtrain.measure.machine import host_room_bytes

from ..full import APPLE_IS_FULL, CUDA_IS_FULL, host_is_full
from ..host_attention import quicken_attention
from ..host_fp16 import INSTEAD, LACKS, is_emulated


class Device(ABC):
    """What the engine needs to know of a device."""

    torch_device: torch.device
    asynchronous: bool
    fused_optimizer: bool
    """Whether torch has a fused AdamW for it."""

    def __init__(self, index: int = 0) -> None:  # noqa: B027
        """`index` tells devices of one kind apart, where there can be several."""

    @abstractmethod
    def probe(self) -> Availability: ...

    def prepare(self) -> None:
        """Before an engine makes its first tensor: most have nothing to do."""
        return

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def live(self) -> Counter | None:
        """Bytes in live tensors."""

    @abstractmethod
    def reserved(self) -> Counter | None:
        """Bytes the allocator or driver holds."""

    def facts(self) -> dict[str, JSON]:
        """What `xtrain doctor` shows of a usable one."""
        return {dtype: self.lacks(dtype) or "yes" for dtype in ("fp32", "bf16", "fp16")}

    def limit_bytes(self) -> int | None:
        """What may be in use at one time without swapping or failing; None where nobody says."""
        return None

    def lacks(self, dtype: str) -> str:
        """Why it cannot compute in "bf16" or "fp16"; empty when it can."""
        return ""

    def random_state(self) -> dict[str, JSON]:
        """torch's generators, as text: the CPU's, and the device's own where it has one."""
        return {"cpu": _encode(torch.get_rng_state())}

    def set_random_state(self, state: Mapping[str, str]) -> None:
        """The inverse; what was drawn on another kind of device means nothing here and is left out."""
        if "cpu" in state:
            torch.set_rng_state(_decode(state["cpu"]))

    def is_out_of_memory(self, error: RuntimeError | MemoryError) -> bool:
        """Whether this is how torch says that this device, and no other one, is full."""
        return isinstance(error, torch.OutOfMemoryError) and str(self.torch_device) in str(error)


def cpu_computes_fp16() -> bool:
    """In hardware, as far as torch can tell; or slowly, where someone asked for it."""
    if is_emulated():
        return True
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


class Cpu(Device):
    """Synchronous; its allocator keeps no counters, so memory is known by category and as RSS."""

    torch_device = torch.device("cpu")
    asynchronous = False
    fused_optimizer = True

    def probe(self) -> Availability:
        threads = torch.get_num_threads()
        reason = f"{platform.machine()}, {threads} thread{'s' if threads != 1 else ''}"
        return Availability(True, reason, preference=10)

    def prepare(self) -> None:
        keep_freed_memory()
        quicken_attention()

    def synchronize(self) -> None:
        pass

    def live(self) -> Counter | None:
        return None

    def reserved(self) -> Counter | None:
        return None

    def facts(self) -> dict[str, JSON]:
        return {
            **super().facts(),
            "threads": torch.get_num_threads(),
            "vector instructions": torch.backends.cpu.get_cpu_capability(),
            "memory free, bytes": psutil.virtual_memory().available,
        }

    def lacks(self, dtype: str) -> str:
        return "" if dtype != "fp16" or cpu_computes_fp16() else f"{LACKS}; {INSTEAD}"

    def limit_bytes(self) -> int | None:
        return host_room_bytes()

    def is_out_of_memory(self, error: RuntimeError | MemoryError) -> bool:
        return host_is_full(error)


class Cuda(Device):
    asynchronous = True
    fused_optimizer = True

    def __init__(self, index: int = 0) -> None:
        self.torch_device = torch.device("cuda", index)
        self.random_key = "cuda" if index == 0 else f"cuda:{index}"

    def probe(self) -> Availability:
        if not torch.cuda.is_available():
            built = "no NVIDIA GPU found" if torch.version.cuda else "this torch is built without CUDA"
            return Availability(False, built)
        count = torch.cuda.device_count()
        if self.torch_device.index >= count:
            return Availability(False, f"this machine has {count} GPU{'s' if count != 1 else ''}")
        gpu = torch.cuda.get_device_properties(self.torch_device)
        return Availability(True, f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB", preference=30)

    def prepare(self) -> None:
        """Peaks are those of one engine, also in a process that had another before it."""
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def live(self) -> Counter | None:
        now = torch.cuda.memory_allocated(self.torch_device)
        return Counter(now, torch.cuda.max_memory_allocated(self.torch_device), "counter")

    def reserved(self) -> Counter | None:
        now = torch.cuda.memory_reserved(self.torch_device)
        return Counter(now, torch.cuda.max_memory_reserved(self.torch_device), "counter")

    def limit_bytes(self) -> int | None:
        """Free now; what this process's own allocator holds is free to it."""
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return free + torch.cuda.memory_reserved(self.torch_device)

    def is_out_of_memory(self, error: RuntimeError | MemoryError) -> bool:
        """torch's allocator names the GPU that is full; the driver and cuBLAS do not."""
        if not isinstance(error, torch.OutOfMemoryError) and not any(
            text in str(error) for text in CUDA_IS_FULL
        ):
            return False
        named = re.search(r"GPU (\d+)", str(error))
        return named is None or int(named[1]) == self.torch_device.index

    def random_state(self) -> dict[str, JSON]:
        own = _encode(torch.cuda.get_rng_state(self.torch_device))
        return {**super().random_state(), self.random_key: own}

    def set_random_state(self, state: Mapping[str, str]) -> None:
        super().set_random_state(state)
        if self.random_key in state:
            torch.cuda.set_rng_state(_decode(state[self.random_key]), self.torch_device)

    def facts(self) -> dict[str, JSON]:
        gpu = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info(0)
        return {
            **super().facts(),
            "GPUs": torch.cuda.device_count(),
            "compute capability": f"{gpu.major}.{gpu.minor}",
            "CUDA of this torch": torch.version.cuda,
            "memory, bytes": total,
            "memory free, bytes": free,
            "TF32 in fp32 products": torch.backends.cuda.matmul.allow_tf32,
            "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        }

    def lacks(self, dtype: str) -> str:
        if dtype != "bf16" or torch.cuda.is_bf16_supported(including_emulation=False):
            return ""
        return "this GPU has no bf16 arithmetic; use precision: fp16"


MPS_SETTINGS = {
    "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "not set (torch: 1.7 x the working set, then out of memory)",
    "PYTORCH_MPS_LOW_WATERMARK_RATIO": "not set (torch: 1.4 x the working set, then memory is given back)",
    "PYTORCH_ENABLE_MPS_FALLBACK": "not set (an operation without a kernel is an error, not slow)",
}
"""Environment variables that change what fits and what runs (torch/docs/source/mps_environment_variables)."""


class Mps(Device):
    """Apple GPUs. There is no peak counter: peaks are sampled on traced steps (xtrain/measure/trace.py)."""

    torch_device = torch.device("mps", 0)
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

    def limit_bytes(self) -> int | None:
        """Metal's working set: beyond it the system begins to move memory about."""
        return torch.mps.recommended_max_memory()

    def is_out_of_memory(self, error: RuntimeError | MemoryError) -> bool:
        return APPLE_IS_FULL in str(error)

    def random_state(self) -> dict[str, JSON]:
        return {**super().random_state(), "mps": _encode(torch.mps.get_rng_state())}

    def set_random_state(self, state: Mapping[str, str]) -> None:
        super().set_random_state(state)
        if "mps" in state:
            torch.mps.set_rng_state(_decode(state["mps"]))

    def facts(self) -> dict[str, JSON]:
        return {
            **super().facts(),
            "fp64": "no Apple GPU has it",
            "macOS": platform.mac_ver()[0],
            "working set recommended by Metal, bytes": torch.mps.recommended_max_memory(),
            "memory of the driver now, bytes": torch.mps.driver_allocated_memory(),
            "unified memory free, bytes": psutil.virtual_memory().available,
            **{name: os.environ.get(name, default) for name, default in MPS_SETTINGS.items()},
        }

    def lacks(self, dtype: str) -> str:
        if dtype != "bf16" or torch.backends.mps.is_macos_or_newer(14, 0):
            return ""
        return "bf16 on Apple GPUs needs macOS 14; use precision: fp16"


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


DEVICES: dict[str, type[Device]] = {"cpu": Cpu, "cuda": Cuda, "mps": Mps}


def device_of(name: str) -> Device:
    """ "cpu", "mps", "cuda", or one of several: "cuda:1"."""
    kind, _, index = name.partition(":")
    return DEVICES[kind](int(index or 0))


def by_device(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors of each device, in order: one operation over many tensors takes those of one device."""
    together: dict[torch.device, list[torch.Tensor]] = {}
    for tensor in tensors:
        together.setdefault(tensor.device, []).append(tensor)
    return list(together.values())
