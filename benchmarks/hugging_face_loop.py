"""Hugging Face's GPT-2 in a plain PyTorch loop: what most people would write first.

With BENCHMARK_CHECKPOINTING=1 it recomputes its blocks, as `gradient_checkpointing_enable` does.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import measured, workload
from benchmarks.plain_loop import train_model
from benchmarks.workload import Workload


def build_model(load: Workload) -> GPT2LMHeadModel:
    """Without dropout, as xtrain's; the weights are the library's own.

    BENCHMARK_ACTIVATION names another form of the same GELU: the library's default for GPT-2 is eight
    operations, its `gelu_pytorch_tanh` one kernel.
    """
    config = GPT2Config.from_dict(load.hugging_face_config())
    config.activation_function = os.environ.get("BENCHMARK_ACTIVATION", config.activation_function)
    return GPT2LMHeadModel(config)


def train(folder: Path) -> measured.Training:
    load, batches = workload.read(folder)
    torch.manual_seed(load.seed)
    model = build_model(load).train()
    if os.environ.get("BENCHMARK_CHECKPOINTING"):
        model.gradient_checkpointing_enable()

    def micro_loss(tokens: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens).loss / load.accumulation
        return loss

    return train_model(load, batches, model, micro_loss)


if __name__ == "__main__":
    measured.main(train)
