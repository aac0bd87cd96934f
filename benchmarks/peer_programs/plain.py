"""An expert's plain PyTorch loop: what every other lane is held against."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import measured, workload
from benchmarks.peer_programs.common import build_model, build_optimizer, step_losses


def train(folder: Path) -> measured.Training:
    load, batches = workload.read(folder)
    model = build_model(load)
    optimizer = build_optimizer(load, model)
    parameters = list(model.parameters())
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=load.precision == "bf16")
    losses, clock = [], measured.Clock()

    for step in range(load.steps):
        for group in optimizer.param_groups:
            group["lr"] = load.learning_rate(step)
        for tokens, targets in torch.from_numpy(batches[step]):
            with autocast:
                loss = model(tokens, targets)
            (loss / load.accumulation).backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, load.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step_ended()

    return clock.training(step_losses(losses, load))


if __name__ == "__main__":
    measured.main(train)
