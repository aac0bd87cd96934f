"""A plain PyTorch training loop, as good as one writes it by hand: what `--backend cpu` is held against.

Only the model and its initial weights are xtrain's. Fused AdamW, gradients set to None, autocast,
one norm and one in-place scaling for all gradients, no loss brought to the host before the end.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from benchmarks import measured, workload
from benchmarks.workload import Workload
from xtrain.models.gpt2 import GPT2
from xtrain.models.init import initialise
from xtrain.models.presets import Dimensions

MicroLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_model(load: Workload) -> GPT2:
    size = Dimensions(
        layers=load.layers,
        hidden=load.hidden,
        heads=load.heads,
        positions=load.positions,
        vocab_size=load.vocab_size,
    )
    model = GPT2(size)
    initialise(model, load.seed, load.layers)
    return model


def build_optimizer(load: Workload, model: torch.nn.Module, fused: bool) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": load.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=load.lr, betas=load.betas, eps=load.eps, fused=fused)


def train_model(
    load: Workload, batches: np.ndarray, model: torch.nn.Module, micro_loss: MicroLoss
) -> measured.Training:
    """`micro_loss` maps a micro-batch's tokens and targets to its part of the step's loss."""
    optimizer = build_optimizer(load, model, fused=True)
    parameters = list(model.parameters())
    losses, step_seconds = [], []
    beginning = perf_counter()

    for step in range(load.steps):
        start = perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = load.learning_rate(step)
        step_loss = torch.zeros(())
        for tokens, targets in torch.from_numpy(batches[step]):
            loss = micro_loss(tokens, targets)
            loss.backward()
            step_loss += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, load.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss)
        step_seconds.append(perf_counter() - start)

    values = torch.stack(losses).tolist()
    return measured.Training(step_seconds, values, perf_counter() - beginning)


def train(folder: Path) -> measured.Training:
    load, batches = workload.read(folder)
    torch.manual_seed(load.seed)
    model = build_model(load).train()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=load.precision == "bf16")

    def micro_loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with autocast:
            loss: torch.Tensor = model(tokens, targets) / load.tokens_per_step
        return loss

    return train_model(load, batches, model, micro_loss)


if __name__ == "__main__":
    measured.main(train)
