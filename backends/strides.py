"""Tensors that come back from the CPU, laid out in memory as they were."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def laid_out(tensor: torch.Tensor, stride: Sequence[int] | None) -> torch.Tensor:
    """`tensor`, or a copy of it with that stride; None is any.

    A part of something wider loses its stride on the way, and compiled code asks for the one it knows: only
    there is a copy worth it, which takes the room of all that the part is spread over. What repeats itself
    (stride 0) stays as it is.
    """
    if stride is None or tensor.stride() == tuple(stride) or 0 in stride:
        return tensor
    made = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device)
    return made.copy_(tensor)
