"""A plain DeepSpeed script of one process: what `--backend deepspeed` is held against.

As its documentation has it: a config, `deepspeed.initialize`, and `backward` and `step` for every
micro-batch. The optimizer is torch's fused AdamW, as under xtrain.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from time import perf_counter
from typing import Any

import deepspeed
import torch

from benchmarks import measured, workload
from benchmarks.plain_loop import build_model, build_optimizer
from benchmarks.workload import Workload


def config(load: Workload) -> dict[str, Any]:
    lower = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return {
        "train_batch_size": load.global_batch,
        "train_micro_batch_size_per_gpu": load.micro_batch,
        "gradient_accumulation_steps": load.accumulation,
        "gradient_clipping": load.clip,
        "zero_optimization": {"stage": load.zero_stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000,
        **({"torch_autocast": lower} if load.precision == "bf16" else {}),
    }


def join_job_of_one() -> None:
    """DeepSpeed looks for MPI where the variables of a launcher are missing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    deepspeed.init_distributed("gloo")


def train(folder: Path) -> measured.Training:
    load, batches = workload.read(folder)
    join_job_of_one()
    torch.manual_seed(load.seed)
    model = build_model(load).train()
    optimizer = build_optimizer(load, model, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(load))
    losses, step_seconds = [], []
    beginning = perf_counter()

    for step in range(load.steps):
        start = perf_counter()
        for group in engine.optimizer.param_groups:
            group["lr"] = load.learning_rate(step)
        step_loss = torch.zeros(())
        for tokens, targets in torch.from_numpy(batches[step]):
            loss = engine(tokens, targets) / tokens.numel()  # DeepSpeed divides by the accumulation
            engine.backward(loss)
            engine.step()
            step_loss += loss.detach() / load.accumulation
        losses.append(step_loss)
        step_seconds.append(perf_counter() - start)

    values = torch.stack(losses).tolist()
    return measured.Training(step_seconds, values, perf_counter() - beginning)


if __name__ == "__main__":
    measured.main(train)
    torch.distributed.destroy_process_group()
