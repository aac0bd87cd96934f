"""Tensors that come back from the CPU, laid out in memory as they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def laid_out(tensor: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """`tensor`, or a copy of it with that stride.

    A part of something wider loses its stride on the way, and compiled code asks for the one it knows. What
    repeats itself (stride 0) stays as it is.
    """
    if tensor.stride() == tuple(stride) or 0 in stride:
        return tensor
    made = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)
