"""The optimizer of the spec over named parameters, in two groups: decayed and not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from xtrain.contract import ModelSource
from xtrain.spec.tree import AdamW, Optimizer


def build_optimizer(
    section: Optimizer, parameters: Mapping[str, nn.Parameter], source: ModelSource, fused: bool
) -> torch.optim.Optimizer:
    """AdamW with decoupled decay on matrices only (Loshchilov and Hutter 2019), or SGD without decay.

    `fused` takes the whole update in one kernel; the learning rate is set at every step.
    """
    decayed = [p for name, p in parameters.items() if source.decayed(name, p)]
    others = [p for name, p in parameters.items() if not source.decayed(name, p)]
    if not isinstance(section, AdamW):
        return torch.optim.SGD([*decayed, *others], lr=section.lr, momentum=section.momentum, fused=fused)
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, eps=section.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
