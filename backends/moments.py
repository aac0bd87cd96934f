"""The optimizer's moments: torch's names of them, and ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtrain.contract import StateKind

if TYPE_CHECKING:
    import torch

MOMENTS: dict[str, StateKind] = {
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "momentum_buffer": "momentum",
}
"""torch's name in an optimizer's state, and ours."""


def kept_moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Those that this optimizer keeps, by torch's names; a stored state may be another's."""
    return ("exp_avg", "exp_avg_sq") if "betas" in optimizer.defaults else ("momentum_buffer",)
