"""Clipping by the global norm (Pascanu et al. 2013), without bringing the norm to the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

EPSILON = 1e-6
"""Keeps the factor finite when all gradients are zero; torch's and DeepSpeed's value."""


def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients as if they were one vector: a 0-dim fp32 tensor on their device."""
    norms = torch.nn.utils.get_total_norm(gradients, norm_type=2.0)
    return norms.float()


def unscale_and_clip(
    gradients: Sequence[torch.Tensor], norm: torch.Tensor, loss_scale: float | None, max_norm: float | None
) -> None:
    """Divide all gradients, in place, by the loss scale, and by norm / max_norm where that is above 1.

    `norm` is the global norm without the loss scale.
    """
    if max_norm is None and loss_scale is None:
        return
    factor = torch.ones_like(norm) if max_norm is None else torch.clamp(max_norm / (norm + EPSILON), max=1.0)
    torch._foreach_mul_(list(gradients), factor / (loss_scale or 1.0))
