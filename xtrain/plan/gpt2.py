"""Bytes that the built-in GPT-2 keeps for its backward pass: counted from its code, not fitted.

Per token and block, in units of the hidden width h: both norms keep their input (2 h) and the products after
them that output (2 h); query, key and value (3 h); attention's output (1 h); GELU's input (4 h) and output
(4 h). Beside these the norms' two statistics each and one fp32 number per head. Under autocast what enters a
matrix product has 16 bits, the stream between blocks 32, and every weight's 16-bit copy is kept until its
backward.
"""

from __future__ import annotations

from dataclasses import dataclass

from xtrain.models.presets import Dimensions
from xtrain.spec.tree import Precision

STREAM_WIDTHS, PRODUCT_WIDTHS = 2, 14
"""h's of a block that are kept as the stream between blocks has them, and as products take them."""
PRODUCTS_KEPT = 10
"""h's that `ops: cheap` keeps: what its five products and attention return (3 + 1 + 1 + 4 + 1)."""
BLOCK_MATRICES = 12
"""h^2's of weights in a block."""
FP32, ID = 4, 8


@dataclass(frozen=True)
class Widths:
    """Bytes per number."""

    weight: int
    compute: int
    """Of what enters matrix products."""
    stream: int
    """Of what passes between blocks."""

    @classmethod
    def of(cls, precision: Precision) -> Widths:
        weight = FP32 if precision.weights == "fp32" else 2
        return cls(weight, FP32 if precision.dtype == "fp32" else 2, weight)

    @property
    def autocast(self) -> bool:
        return self.compute != self.weight


@dataclass(frozen=True)
class Kept:
    """A micro-batch of `tokens` tokens through a model of that size."""

    size: Dimensions
    tokens: int
    widths: Widths

    @property
    def stream(self) -> int:
        """One tensor between blocks."""
        return self.tokens * self.size.hidden * self.widths.stream

    @property
    def expanded(self) -> int:
        """One tensor of four times the width, inside a block."""
        return 4 * self.tokens * self.size.hidden * self.widths.compute

    @property
    def weight_copies(self) -> int:
        """16-bit copies of a block's matrices."""
        return BLOCK_MATRICES * self.size.hidden**2 * 2 if self.widths.autocast else 0

    @property
    def block(self) -> int:
        """All that one block keeps, its input too."""
        per_token = self.size.hidden * (
            STREAM_WIDTHS * self.widths.stream + PRODUCT_WIDTHS * self.widths.compute
        )
        statistics = 4 * self.widths.stream + FP32 * self.size.heads
        return self.tokens * (per_token + statistics) + self.weight_copies

    @property
    def block_without_cheap(self) -> int:
        """What `ops: cheap` keeps of a block."""
        products = self.size.hidden * PRODUCTS_KEPT * self.widths.compute
        return self.stream + self.tokens * (products + FP32 * self.size.heads)

    @property
    def ids(self) -> int:
        """Tokens and targets."""
        return 2 * self.tokens * ID

    @property
    def head(self) -> int:
        """Of the final norm: input and statistics."""
        return self.stream + 2 * self.tokens * self.widths.stream

    def logits(self, chunk_tokens: int | None) -> int:
        """At the height of the loss, in bytes: fp32 logits of a chunk, beside the product in its own 16 bits.

        Without chunks the log-probabilities are there too. With them, what the chunk adds to the gradients of
        the stream and of the weight may count for more: there the logits have become their gradient.
        """
        rows = min(chunk_tokens or self.tokens, self.tokens)
        one = rows * self.size.vocab_size
        narrow = self.widths.compute if self.widths.compute != FP32 else 0
        if chunk_tokens is None:
            return one * (2 * FP32 + narrow)
        stream = self.widths.compute * (one + rows * self.size.hidden)
        weight = narrow * (one + self.size.vocab_size * self.size.hidden)
        return max(one * (FP32 + narrow), stream, weight)


def block_parameters(size: Dimensions) -> int:
    """12 h^2 weights, 13 h biases and norms."""
    return BLOCK_MATRICES * size.hidden**2 + 13 * size.hidden
