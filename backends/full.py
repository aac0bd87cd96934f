"""How a full device is told in words: torch has an exception of its own only for its GPU allocators."""

from __future__ import annotations

import torch

CUDA_IS_FULL = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
APPLE_IS_FULL = "MPS backend out of memory"


def host_is_full(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def full_place(error: BaseException, device: torch.device) -> str | None:
    """What is full, `device` or the host, for a process that computes on `device`; None where nothing is."""
    if host_is_full(error):
        return "cpu"
    said = isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in (*CUDA_IS_FULL, APPLE_IS_FULL)
    )
    return str(device) if said else None
