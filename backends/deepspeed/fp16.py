"""Whether fp16 can be computed here: asked before anything starts, and again where it is to be computed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from xtrain.contract import Problem
from xtrain.errors import RequestError
from xtrain.measure.machine import cpu_flags

from .environment import sees_gpu

if TYPE_CHECKING:
    import torch

    from xtrain.spec.tree import Spec

EMULATED = "XTRAIN_EMULATED_FP16"
CPU_FLAGS = {"avx512_fp16", "amx_fp16", "avx_ne_convert"}
"""Any of them, as Linux names them: oneDNN computes fp16 with one of these, and torch asks oneDNN."""
LACKS = "this processor has no fp16 arithmetic (on a CPU avx512_fp16 or AMX)"
INSTEAD = f"use precision: bf16, or set {EMULATED}=1 to have it computed slowly"


def fp16_problems(spec: Spec, flags: Collection[str] | None = None) -> Iterator[Problem]:
    """Only what is sure without torch: an x86 CPU that says it has none, and no GPU beside it."""
    if spec.precision.dtype != "fp16" or is_emulated() or sees_gpu():
        return
    flags = cpu_flags() if flags is None else flags
    if flags and not CPU_FLAGS & set(flags):
        yield Problem("precision", "fp16", f"{LACKS}, and there is no GPU", INSTEAD)


def is_emulated() -> bool:
    return os.environ.get(EMULATED) == "1"


def require_fp16(device: torch.device) -> None:
    """Refuse fp16 where there is none, as DeepSpeed would, unless slow arithmetic was asked for."""
    import torch
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.is_fp16_supported():
        return
    if device.type != "cpu" or not is_emulated():
        raise RequestError(f"precision fp16 on deepspeed: {LACKS}; {INSTEAD}")
    supported = [*accelerator.supported_dtypes(), torch.float16]
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: supported
