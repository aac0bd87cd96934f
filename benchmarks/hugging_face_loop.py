"""Hugging Face's GPT-2 in a plain PyTorch loop: what most people would write first.

With BENCHMARK_CHECKPOINTING=1 it recomputes its blocks, as `gradient_checkpointing_enable` does.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import perf_counter

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import measured, workload
from benchmarks.plain_loop import build_optimizer
from benchmarks.workload import Workload


def build_model(load: Workload) -> GPT2LMHeadModel:
    """Without dropout, as xtrain's; the weights are the library's own."""
    return GPT2LMHeadModel(GPT2Config.from_dict(load.hugging_face_config()))


def train(folder: Path) -> measured.Training:
    load, batches = workload.read(folder)
    torch.manual_seed(load.seed)
    model = build_model(load).train()
    if os.environ.get("BENCHMARK_CHECKPOINTING"):
        model.gradient_checkpointing_enable()
    optimizer = build_optimizer(load, model, fused=True)
    losses, step_seconds = [], []
    beginning = perf_counter()

    for step in range(load.steps):
        start = perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = load.learning_rate(step)
        step_loss = torch.zeros(())
        for tokens, _ in torch.from_numpy(batches[step]):
            loss = model(input_ids=tokens, labels=tokens).loss / load.accumulation
            loss.backward()
            step_loss += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), load.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss)
        step_seconds.append(perf_counter() - start)

    values = torch.stack(losses).tolist()
    return measured.Training(step_seconds, values, perf_counter() - beginning)


if __name__ == "__main__":
    measured.main(train)
