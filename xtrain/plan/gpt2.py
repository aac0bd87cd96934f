"""Bytes that the built-in GPT-2 keeps for its backward pass: counted from its code, not fitted.

Per token and block, in units of the hidden width h: both norms keep their input (2 h) and the products after
them that output (2 h); query, key and value (3 h); attention's output (1 h); GELU's input (4 h) and output
(4 h). Beside these the norms' two statistics each and one fp32 number per head. Under autocast what enters a
matrix product has 16 bits, the stream between blocks 32, and every weight's 16-bit copy is kept until its
backward.
"""

from __future__ import annotations

from xtrain.models.presets import Dimensions, parameter_count
from xtrain.plan.model import FP32, ModelBytes, Widths

STREAM_WIDTHS, PRODUCT_WIDTHS = 2, 14
"""h's of a block that are kept as the stream between blocks has them, and as products take them."""
PRODUCTS_KEPT = 10
"""h's that `ops: cheap` keeps: what its five products and attention return (3 + 1 + 1 + 4 + 1)."""
BLOCK_MATRICES, BLOCK_VECTORS = 12, 13
"""h^2's of weights and h's of biases and norms in a block."""
EXPANSION = 4


def model_bytes(size: Dimensions, tokens: int, widths: Widths) -> ModelBytes:
    """A micro-batch of `tokens` tokens through a model of that size."""
    h, stream = size.hidden, tokens * size.hidden * widths.stream
    per_head = FP32 * size.heads
    kept = h * (STREAM_WIDTHS * widths.stream + PRODUCT_WIDTHS * widths.compute)
    statistics = 4 * widths.stream + per_head
    copies = BLOCK_MATRICES * h**2 * 2 if widths.autocast else 0
    return ModelBytes(
        layers=size.layers,
        hidden=h,
        vocab_size=size.vocab_size,
        tokens=tokens,
        widths=widths,
        parameters=parameter_count(size),
        block_parameters=BLOCK_MATRICES * h**2 + BLOCK_VECTORS * h,
        widest=EXPANSION * h**2,
        tied=True,
        block=tokens * (kept + statistics) + copies,
        block_without_cheap=stream + tokens * (h * PRODUCTS_KEPT * widths.compute + per_head),
        views=tokens * h * widths.compute,  # attention's output, as the projection after it sees it
        weight_copies=copies,
        expanded=EXPANSION * tokens * h * widths.compute,
        head=stream + 2 * tokens * widths.stream,
    )
