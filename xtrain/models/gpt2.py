"""The GPT-2 family (Radford et al. 2019), lean: stem, blocks, head.

Pre-norm blocks, learned positions, tanh-approximated GELU, one fused query-key-value projection,
scaled dot-product attention, the head tied to the token embedding.
"""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from torch import nn

from xtrain.models.loss import ChunkedHead
from xtrain.models.loss_chunk import LossChunk
from xtrain.models.presets import Dimensions

NORM_EPS = 1e-5


class Stem(nn.Module):
    """tokens [batch, seq] -> hidden [batch, seq, width]"""

    def __init__(self, size: Dimensions, dropout: float) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(size.vocab_size, size.hidden)
        self.position_embedding = nn.Embedding(size.positions, size.hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden: torch.Tensor = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))
        return hidden


class Attention(nn.Module):
    """Causal self-attention over [batch, seq, width]."""

    def __init__(self, size: Dimensions, dropout: float) -> None:
        super().__init__()
        self.heads = size.heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(size.hidden, 3 * size.hidden)
        self.projection = nn.Linear(size.hidden, size.hidden)
        self.output_dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, seq, width = hidden.shape
        by_head = self.query_key_value(hidden).view(batch, seq, 3, self.heads, width // self.heads)
        query, key, value = by_head.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        merged = mixed.transpose(1, 2).reshape(batch, seq, width)
        output: torch.Tensor = self.output_dropout(self.projection(merged))
        return output


class FeedForward(nn.Module):
    def __init__(self, size: Dimensions, dropout: float) -> None:
        super().__init__()
        self.expansion = nn.Linear(size.hidden, 4 * size.hidden)
        self.projection = nn.Linear(4 * size.hidden, size.hidden)
        self.output_dropout = nn.Dropout(dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.output_dropout(
            self.projection(F.gelu(self.expansion(hidden), approximate="tanh"))
        )
        return output


class Block(nn.Module):
    """One transformer layer, [batch, seq, width] -> the same."""

    def __init__(self, size: Dimensions, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.hidden, eps=NORM_EPS)
        self.attention = Attention(size, dropout)
        self.feed_forward_norm = nn.LayerNorm(size.hidden, eps=NORM_EPS)
        self.feed_forward = FeedForward(size, dropout)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        output: torch.Tensor = hidden + self.feed_forward(self.feed_forward_norm(hidden))
        return output


class Head(ChunkedHead):
    """hidden [batch, seq, width] -> logits, or with targets the sum of token losses.

    The loss is taken here, inside the module that owns the projection, so that an engine which
    gathers parameters module by module has it at hand.
    """

    def __init__(self, size: Dimensions, loss_chunk: LossChunk) -> None:
        super().__init__(loss_chunk)
        self.norm = nn.LayerNorm(size.hidden, eps=NORM_EPS)
        self.weight = nn.Parameter(torch.empty(size.vocab_size, size.hidden))

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.norm(hidden)
        if targets is None:
            return F.linear(hidden, self.weight)
        return self.loss_sum(hidden, self.weight, targets)


class GPT2(nn.Module):
    """Maps tokens to logits, and (tokens, targets) to the sum of token losses.

    tokens, targets: int64 [batch, seq]. Weights are whatever torch draws: xtrain/models/init.py
    sets them.
    """

    def __init__(self, size: Dimensions, dropout: float = 0.0, loss_chunk: LossChunk = "auto") -> None:
        super().__init__()
        self.stem = Stem(size, dropout)
        self.blocks = nn.ModuleList(Block(size, dropout) for _ in range(size.layers))
        self.head = Head(size, loss_chunk)
        self.tie()

    def tie(self) -> None:
        """Head and token embedding are one parameter."""
        shared = self.stem.token_embedding.weight
        assert isinstance(shared, nn.Parameter)
        self.head.weight = shared

    @overload
    def forward(self, tokens: torch.Tensor) -> torch.Tensor: ...
    @overload
    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor: ...
    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.stem(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        output: torch.Tensor = self.head(hidden, targets)
        return output
