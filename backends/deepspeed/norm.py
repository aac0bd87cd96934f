"""The gradient norm and clipping at ZeRO stage 0, where every rank holds every gradient.

DeepSpeed clips there without telling the norm; taking it a second time would cost a pass over all
gradients. So its own clipping is off at stage 0, and this stands between backward and update.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

EPSILON = 1e-6
"""Keeps the factor finite when all gradients are zero; torch's and DeepSpeed's value."""


def clip_replicated(parameters: Iterable[torch.Tensor], max_norm: float | None) -> torch.Tensor:
    """The global norm before clipping, 0-dim; scales the gradients in place where it is above max_norm."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type=2.0)
    if max_norm is not None:
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + EPSILON), max=1.0))
    return norm
