"""Factories whose code does to its parameters what users' code does, and one that cannot be cut up."""

from __future__ import annotations

import copy
import os

import numpy as np
import torch
from torch import nn

VOCABULARY, WIDTH, LAYERS = 257, 128, 4


class Thorough(nn.Module):
    """Copies its layers, draws its weights at the end, computes with them, ties its head, has a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList([layer, *(copy.deepcopy(layer) for _ in range(1, LAYERS))])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, WIDTH))
        self.apply(self._draw)
        self.head.weight = self.embedding.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.div_(1 + parameter.norm())
            self.embedding.weight[0].fill_(0.25)
            self.get_parameter("layers.0.linear1.bias").detach().numpy()[:] = np.arange(2 * WIDTH)
            changed = self.get_parameter("layers.1.linear1.weight")
            changed.data = changed.data.flip(0).half()

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens) * self.scale
        for layer in self.layers:
            hidden = layer(hidden, src_mask=nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]))
        return self.head(hidden)  # type: ignore[no-any-return]


class Square(nn.Module):
    """Two layers of one square matrix each, a little larger than the smallest bucket: an odd number."""

    def __init__(self) -> None:
        super().__init__()
        width = 2049
        self.table = nn.Embedding(8192, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return nn.functional.linear(hidden, self.table.weight)


def square() -> nn.Module:
    return Square()


def thorough() -> nn.Module:
    return Thorough()


def learning() -> nn.Module:
    """Takes a gradient while it is built."""
    model = Thorough().float()
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    model.zero_grad()
    return model


def unequal() -> nn.Module:
    """The ranks look at different parameters."""
    model = Thorough()
    rank = int(os.environ.get("RANK", "0"))
    assert bool(model.get_parameter(f"layers.{rank}.linear1.weight").isfinite().all())
    return model


MORE_THAN_ANY_HOST_HAS = 1 << 60
"""Bytes."""


class Greedy(nn.Module):
    """Does not fit once it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.training:
            torch.empty(MORE_THAN_ANY_HOST_HAS, dtype=torch.uint8)
        return self.embedding(tokens)  # type: ignore[no-any-return]


def greedy() -> nn.Module:
    return Greedy()


def large() -> nn.Module:
    """Does not fit at all."""
    return nn.Embedding(MORE_THAN_ANY_HOST_HAS >> 10, VOCABULARY)
