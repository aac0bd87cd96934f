"""torch's optimizers with a veto: DeepSpeed calls `step`, and a guard may have refused the update."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from xtrain.spec.tree import AdamW, Optimizer


class Vetoed:
    """Mixed into an optimizer: `step` does nothing while `veto` says so.

    ZeRO stages 1 to 3 call `step` once per parameter group or sub-group, so the question is asked once
    per update and the answer kept.
    """

    veto: Callable[[], bool] | None = None

    def step(self, closure: Any = None) -> Any:
        if self.veto is not None and self.veto():
            return None
        return super().step(closure)  # type: ignore[misc]


class VetoedAdamW(Vetoed, torch.optim.AdamW):
    pass


class VetoedSGD(Vetoed, torch.optim.SGD):
    pass


def build_optimizer(
    section: Optimizer, model: nn.Module, decayed_names: Collection[str]
) -> VetoedAdamW | VetoedSGD:
    """Two groups, decayed and not; the learning rate is set at every step."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if name in decayed_names]
    others = [p for name, p in named if name not in decayed_names]
    groups: list[dict[str, Any]] = [{"params": group} for group in (decayed, others) if group]
    if not isinstance(section, AdamW):
        return VetoedSGD(groups, lr=section.lr, momentum=section.momentum, fused=True)
    for group in groups:
        group["weight_decay"] = section.weight_decay if group["params"] is decayed else 0.0
    return VetoedAdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)
