"""Whether fp16 can be computed here: asked before anything starts, and again where it is to be computed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from xtrain.contract import Problem
from xtrain.errors import RequestError

from ..host_fp16 import INSTEAD, LACKS, is_emulated, surely_lacks_fp16
from .environment import sees_gpu

if TYPE_CHECKING:
    import torch

    from xtrain.spec.tree import Spec


def fp16_problems(spec: Spec, flags: Collection[str] | None = None) -> Iterator[Problem]:
    """Only what is sure without torch: a CPU that says it has none, and no GPU beside it."""
    if spec.precision.dtype == "fp16" and not sees_gpu() and surely_lacks_fp16(flags):
        yield Problem("precision", "fp16", f"{LACKS}, and there is no GPU", INSTEAD)


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
