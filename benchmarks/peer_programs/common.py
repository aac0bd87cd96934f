"""What the peers' programs share: the model, the optimizer, the data, as each framework likes to have them.

BENCHMARK_MODEL says which model: `hf`, the transformers library's GPT-2 from a config, or `own`, xtrain's.
Both start from weights that follow from the workload's seed.
"""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from benchmarks import plain_loop
from benchmarks.workload import Workload

STAGE = "BENCHMARK_ZERO_STAGE"


class MeanLoss(nn.Module):
    """(tokens, targets) -> mean loss, for either model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        output = self.model(tokens)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def build_model(load: Workload) -> MeanLoss:
    torch.manual_seed(load.seed)
    if os.environ["BENCHMARK_MODEL"] == "own":
        return MeanLoss(plain_loop.build_model(load)).train()
    from benchmarks import hugging_face_loop  # the transformers library: seconds, and memory

    return MeanLoss(hugging_face_loop.build_model(load)).train()


def build_optimizer(load: Workload, model: nn.Module) -> torch.optim.AdamW:
    return plain_loop.build_optimizer(load, model, fused=True)


def build_schedule(load: Workload, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: load.learning_rate(step) / load.lr)


class Sequences(Dataset[dict[str, torch.Tensor]]):
    """The workload's sequences in order, for a loader that takes `micro_batch` at a time, unshuffled."""

    def __init__(self, batches: np.ndarray) -> None:
        steps, accumulation, _, micro_batch, context = batches.shape
        self.pairs = torch.from_numpy(batches).transpose(2, 3).reshape(-1, 2, context)
        assert len(self.pairs) == steps * accumulation * micro_batch

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        tokens, targets = self.pairs[place]
        return {"tokens": tokens, "targets": targets}


def step_losses(micro_losses: list[torch.Tensor], load: Workload) -> list[float]:
    """Means over the micro-batches of each step."""
    losses: list[float] = torch.stack(micro_losses).view(-1, load.accumulation).mean(dim=1).tolist()
    return losses
