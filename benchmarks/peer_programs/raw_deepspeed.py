"""A DeepSpeed script of one process, as its documentation has it; the stage is in BENCHMARK_ZERO_STAGE."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch

from benchmarks import measured, workload
from benchmarks.peer_programs.common import STAGE, build_model, build_optimizer, step_losses
from benchmarks.plain_deepspeed import config, join_job_of_one


def train(folder: Path) -> measured.Training:
    load, batches = workload.read(folder)
    join_job_of_one()
    model = build_model(load)
    staged = replace(load, zero_stage=int(os.environ.get(STAGE, "0")))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=build_optimizer(load, model), config=config(staged)
    )
    losses, clock = [], measured.Clock()

    for step in range(load.steps):
        for group in engine.optimizer.param_groups:
            group["lr"] = load.learning_rate(step)
        for tokens, targets in torch.from_numpy(batches[step]):
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        clock.step_ended()

    return clock.training(step_losses(losses, load))


if __name__ == "__main__":
    measured.main(train)
    torch.distributed.destroy_process_group()
