"""What the planner has to know of a model: how large its parts are, and what a micro-batch leaves in them."""

from __future__ import annotations

from dataclasses import dataclass

from xtrain.spec.tree import Precision

FP32, ID = 4, 8
"""Bytes per number, and per token's number."""


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
class ModelBytes:
    """One micro-batch of `tokens` tokens in a model. Bytes, where it does not say numbers.

    Counted from the code of the built-in models (gpt2.py), traced for all others (traced.py).
    """

    layers: int
    hidden: int
    vocab_size: int
    tokens: int
    widths: Widths
    parameters: int
    """Numbers, tied ones once."""
    block_parameters: int
    """Numbers in one block."""
    widest: int
    """Numbers in the largest matrix of a block."""
    tied: bool
    """Whether the head's matrix is the token embedding."""
    block: int
    """All that one block keeps for its backward pass, its input too."""
    block_without_cheap: int
    """What `ops: cheap` keeps of a block."""
    products_beside: int
    """Of these, products that no backward pass asks for: they are there until the block's is done."""
    views: int
    """Of what a block keeps, views of something else that it keeps: a copy of each is one of its own."""
    weight_copies: int
    """16-bit copies of a block's matrices that autocast makes."""
    expanded: int
    """The largest tensor inside a block."""
    head: int
    """What is kept outside the blocks: by the final norm, for most models."""
    whole_logits: bool = False
    """Whether the loss is taken of the model's own logits, all at once."""
    gated: bool = False
    """Whether the largest tensor of a block is a product, element by element, of two as large."""

    @property
    def outside_parameters(self) -> int:
        """Numbers in no block."""
        return self.parameters - self.layers * self.block_parameters

    @property
    def projection(self) -> int:
        """Numbers in the head's matrix."""
        return self.vocab_size * self.hidden

    @property
    def stream(self) -> int:
        """One tensor between blocks."""
        return self.tokens * self.hidden * self.widths.stream

    @property
    def ids(self) -> int:
        """Tokens and targets."""
        return 2 * self.tokens * ID

    def logits(self, chunk_tokens: int | None) -> tuple[int, int]:
        """At the height of the loss: what is as wide as the vocabulary, and what is made beside it.

        fp32 logits of a chunk, beside the product in its own 16 bits. Without chunks the log-probabilities
        are there too. With them, what the chunk adds to the gradients of the stream and of the weight may
        count for more: there the logits have become their gradient.
        """
        rows = min(chunk_tokens or self.tokens, self.tokens)
        one = rows * self.vocab_size
        narrow = self.widths.compute if self.widths.compute != FP32 else 0
        if chunk_tokens is None:
            return one * (2 * FP32 + narrow), 0
        product = one * (FP32 + narrow), 0
        to_stream = one * self.widths.compute, rows * self.hidden * self.widths.compute
        to_weight = one * narrow, self.projection * narrow
        return max(product, to_stream, to_weight, key=sum)
