"""A small model whose passes can be made longer by work that changes nothing of what it learns."""

from __future__ import annotations

import torch
from torch import nn

VOCABULARY, WIDTH, LAYERS = 257, 128, 4
SIDE = 96
"""Of the square product that is one unit of extra work."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = hidden + self.down(self.up(self.norm(hidden)).relu())
        return out


class Planted(nn.Module):
    """Tokens to logits; `extra` products in every forward pass lead nowhere."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self._work(tokens)
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits

    @torch.no_grad()
    def _work(self, tokens: torch.Tensor) -> None:
        product = torch.full((SIDE, SIDE), 1 / SIDE, device=tokens.device)
        for _ in range(self.extra):
            product = product @ product


def build(extra: int = 0) -> nn.Module:
    return Planted(extra)
