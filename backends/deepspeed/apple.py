"""DeepSpeed on a Mac's GPU: what its MPS accelerator can do, and what it cannot.

Written from DeepSpeed 0.19.8's sources (accelerator/mps_accelerator.py, ops/op_builder/mps, comm/torch.py);
not tried on real hardware. It has ZeRO 0-3 on one device: collectives go through copies on the CPU, since
gloo, macOS's only library for them, takes no tensors of the GPU.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

from xtrain.contract import Availability, Problem
from xtrain.spec.tree import Offload

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

UNTRIED = "not tried on real hardware"
OLDEST_TORCH = (2, 5)
"""For torch.mps.recommended_max_memory, which DeepSpeed's accelerator asks for."""
OLDEST_DEEPSPEED = (0, 19)
BF16_MACOS = (14, 0)


@dataclass(frozen=True)
class Mac:
    """What a decision about this machine needs."""

    macos: tuple[int, ...]
    torch: tuple[int, ...]
    deepspeed: tuple[int, ...]
    has_mps: bool
    """Whether torch can use its GPU."""


def on_mac() -> bool:
    return sys.platform == "darwin"


def this_mac() -> Mac:
    """Imports torch."""
    import torch

    ours, theirs = _numbers(version("torch")), _numbers(version("deepspeed"))
    return Mac(macos_version(), ours, theirs, torch.backends.mps.is_available())


def macos_version() -> tuple[int, ...]:
    return _numbers(platform.mac_ver()[0])


def decide(mac: Mac) -> Availability:
    """Whether DeepSpeed can be used on this Mac; only when it is named, because nobody tried it."""
    shown = ".".join(map(str, mac.deepspeed))
    if not mac.has_mps:
        return Availability(False, f"DeepSpeed {shown} on a Mac needs a GPU that torch can use; use cpu")
    if mac.torch < OLDEST_TORCH:
        return Availability(False, "DeepSpeed's MPS accelerator needs torch 2.5 or newer; use mps")
    if mac.deepspeed < OLDEST_DEEPSPEED:
        return Availability(False, f"DeepSpeed {shown} cannot train on MPS; install 0.19, or use mps")
    bf16 = "" if mac.macos >= BF16_MACOS else ", no bf16 before macOS 14"
    return Availability(True, f"DeepSpeed {shown} on MPS, one process{bf16}; {UNTRIED}", preference=None)


def mac_problems(spec: Spec, world: int, macos: tuple[int, ...]) -> Iterator[Problem]:
    """What of the spec DeepSpeed cannot do on a Mac."""
    if world > 1:
        expected = "expected 1 on a Mac: it has one GPU, and DeepSpeed gives each process its own"
        yield Problem("launch.processes", str(world), expected, "use 1")
    if spec.precision.dtype == "bf16" and macos < BF16_MACOS:
        expected = "Metal has bf16 from macOS 14 on"
        yield Problem("precision", "bf16", expected, "use fp16 or fp32, or update macOS")
    for name in Offload.model_fields:
        if getattr(spec.techniques.offload, name).device == "nvme":
            expected = "DeepSpeed has no asynchronous file operator for macOS"
            yield Problem(f"memory.offload.{name}.device", "nvme", expected, "use cpu")


def mac_notes(spec: Spec) -> Iterator[str]:
    yield f"DeepSpeed on MPS is {UNTRIED}; the same spec on the mps backend is the one to compare with"
    if spec.techniques.offload != Offload():
        yield (
            "on unified memory offload frees no physical byte: it makes room under Metal's working-set "
            "limit, and lets the CPU's cores do the update"
        )


def _numbers(text: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)"""
    return tuple(int(part) for part in text.partition("+")[0].split(".") if part.isdigit())
