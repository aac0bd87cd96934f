"""Which of `manual.devices` this machine has not, as far as can be seen without loading torch."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from xtrain.contract import Problem

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/nvmap", "/dev/kfd")
"""What there is where torch's `cuda` may work: NVIDIA's driver, Windows' for Linux, a Jetson's; AMD's."""


def missing_here(spec: Spec) -> Iterator[Problem]:
    """Whether a device that may be there can really be used is seen when a run starts."""
    for name in dict.fromkeys((spec.manual.devices if spec.manual else None) or []):
        if reason := _absent(name):
            nearest = "fine where the spec is for another one; here use main or cpu"
            yield Problem("manual.devices", name, f"not on this machine: {reason}", nearest)


def _absent(name: str) -> str:
    if name == "mps" and (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return "it is no Mac with Apple silicon"
    if name.partition(":")[0] == "cuda" and not any(Path(driver).exists() for driver in DRIVERS):
        return "no driver of a GPU found"
    return ""
