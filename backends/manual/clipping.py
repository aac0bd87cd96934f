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


def scale_to_norm(gradients: Sequence[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
    """Multiply all gradients, in place, by max_norm / norm where that is below 1."""
    factor = torch.clamp(max_norm / (norm + EPSILON), max=1.0)
    torch._foreach_mul_(list(gradients), factor)
