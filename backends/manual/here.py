"""What of a spec this machine has not, as far as can be seen without loading torch."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xtrain.contract import Problem

from ..host_fp16 import INSTEAD, LACKS, surely_lacks_fp16
from .drivers import driver_found
from .support import device_names

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

ELSEWHERE = "fine where the spec is for another one; here"


def missing_here(spec: Spec, main: str) -> Iterator[Problem]:
    """Whether what may be there can be used is seen when a run starts; `main` is the backend's device."""
    for name in dict.fromkeys((spec.manual.devices if spec.manual else None) or []):
        if reason := _absent(name):
            expected = f"not on this machine: {reason}"
            yield Problem("manual.devices", name, expected, f"{ELSEWHERE} use main or cpu")
    on_cpu = "cpu" in device_names(spec, main)
    if spec.precision.dtype == "fp16" and on_cpu and surely_lacks_fp16():
        yield Problem("precision", "fp16", f"not on this machine: {LACKS}", f"{ELSEWHERE} {INSTEAD}")


def _absent(name: str) -> str:
    if name == "mps" and (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return "it is no Mac with Apple silicon"
    if name.partition(":")[0] == "cuda" and not driver_found():
        return "no driver of a GPU found"
    return ""
