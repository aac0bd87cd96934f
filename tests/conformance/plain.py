"""The anchor: what every lane must equal, in bare torch, sharing nothing but model and data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from xtrain.data import open_data
from xtrain.models.source import model_source
from xtrain.spec.tree import AdamW, Cosine, Spec


@dataclass
class Curve:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def train(spec: Spec, model: torch.nn.Module | None = None) -> Curve:
    """The whole global batch in one pass: no accumulation, no seam.

    `model` maps (tokens, targets) to the sum of token losses; without it, it is the spec's own.
    """
    data = open_data(spec, show_progress=False)
    model = model or model_source(spec, data.vocab_size).build()
    optimizer = _optimizer(spec, model)
    curve = Curve()
    for step in range(spec.train.steps):
        batches = data.micro_batches(step, 0, 1)
        tokens = torch.cat([torch.from_numpy(batch.tokens) for batch in batches])
        targets = torch.cat([torch.from_numpy(batch.targets) for batch in batches])
        loss = model(tokens, targets) / (targets >= 0).sum()
        loss.backward()
        limit = math.inf if spec.train.clip is None else spec.train.clip
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(spec, step)
        optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(float(loss.detach()))
        curve.norms.append(float(norm))
    return curve


def _optimizer(spec: Spec, model: torch.nn.Module) -> torch.optim.Optimizer:
    section = spec.optimizer
    if not isinstance(section, AdamW):
        return torch.optim.SGD(model.parameters(), lr=0.0, momentum=section.momentum)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": section.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=section.betas, eps=section.eps)


def _learning_rate(spec: Spec, step: int) -> float:
    schedule, peak = spec.schedule, spec.optimizer.lr
    assert isinstance(schedule, Cosine)
    if step < schedule.warmup:
        return peak * step / schedule.warmup
    progress = (step - schedule.warmup) / (spec.train.steps - schedule.warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
