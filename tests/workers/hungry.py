"""A model that the system kills, as it does where memory is short.

The first time while it is built, then whenever a pass has too many sequences.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import nn

TOO_MANY = 4
COUNTER = "XTRAIN_TEST_VMSTAT"
"""Names the file in which the system counts such a kill."""


class Hungry(nn.Module):
    """Tokens to logits, for at most TOO_MANY - 1 sequences, from the third pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 8)
        self.head = nn.Linear(8, 257)
        self.passes = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        if self.passes > 2 and self.training and len(tokens) >= TOO_MANY:
            kill()
        logits: torch.Tensor = self.head(self.embedding(tokens))
        return logits


def kills() -> int:
    return int(Path(os.environ[COUNTER]).read_text().split()[1])


def kill() -> None:
    Path(os.environ[COUNTER]).write_text(f"oom_kill {kills() + 1}\n")
    os.kill(os.getpid(), signal.SIGKILL)


def build() -> nn.Module:
    if kills() == 0 and not torch.empty(0).is_meta:  # not for the planner, which builds it without numbers
        kill()
    return Hungry()
