"""Clipping by the global norm (Pascanu et al. 2013), without waiting for a device to tell it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .devices import by_device
from .transfers import HOST

EPSILON = 1e-6
"""Keeps the factor finite when all gradients are zero; torch's and DeepSpeed's value."""


def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients as if they were one vector: a 0-dim fp32 tensor on the first one's device.

    From each other device one number comes there.
    """
    groups = by_device(gradients) or [[]]
    return norm_of_norms([torch.nn.utils.get_total_norm(group, norm_type=2.0).float() for group in groups])


def norm_of_norms(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of vectors whose own are given, as if they were one: 0-dim, on the first one's device."""
    if len(norms) == 1:
        return norms[0]
    together: torch.Tensor = torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms]))
    return together


def unscale_and_clip(
    gradients: Sequence[torch.Tensor], norm: torch.Tensor, loss_scale: float | None, max_norm: float | None
) -> None:
    """Divide all gradients, in place, by the loss scale, and by norm / max_norm where that is above 1.

    `norm` is the global norm without the loss scale.
    """
    if max_norm is None and loss_scale is None:
        return
    factor = torch.ones_like(norm) if max_norm is None else torch.clamp(max_norm / (norm + EPSILON), max=1.0)
    factor = factor / (loss_scale or 1.0)
    if factor.device == HOST and float(factor) == 1.0:
        return  # it is at hand there, and to multiply by 1 would go through all gradients for nothing
    for group in by_device(gradients):
        torch._foreach_mul_(group, factor.to(group[0].device))
