"""A model with code of its own that draws from Python's and NumPy's generators, also which part it uses."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

FACTORY = "tests.drawing_model:build"


class Drawing(nn.Module):
    """Token ids to logits; `sometimes` has no gradient where it was not drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 8)
        self.sometimes = nn.Linear(8, 8)
        self.head = nn.Linear(8, 257)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens) * (1 + 0.1 * random.gauss(0.0, 1.0))
        if np.random.random() < 0.5:
            hidden = hidden + self.sometimes(hidden)
        logits: torch.Tensor = self.head(hidden + 0.1 * np.random.standard_normal())
        return logits


def build() -> nn.Module:
    model = Drawing()
    with torch.no_grad():
        model.head.bias.copy_(torch.from_numpy(np.random.standard_normal(257)))
        model.embedding.weight.mul_(random.uniform(0.5, 2.0))
    return model
