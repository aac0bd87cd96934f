"""Bytes that the built-in GPT-2 keeps for its backward pass: counted from its code, not fitted.

Per token and block, in units of the hidden width h: both norms keep their input (2 h) and the products after
them that output (2 h); query, key and value (3 h); attention's output (1 h); GELU's input (4 h) and output
(4 h). Beside these the norms' two statistics each and one fp32 number per head. Under autocast what enters a
matrix product has 16 bits, the stream between blocks 32, and every weight's 16-bit copy is kept until its
backward.

Dropout keeps which elements it dropped: of the stem's output and of both products that a block adds to the
stream. On a device that is a byte each, and attention keeps no more than without. The host multiplies by a
tensor of its operand's own width, and has no fused attention with dropout: scores of every token with every
other are kept three times (after softmax, the noise, and their product), in fp32, beside query, key, value.
"""

from __future__ import annotations

from dataclasses import replace

from xtrain.models.presets import Dimensions, parameter_count
from xtrain.plan.model import FP32, ModelBytes, Widths
from xtrain.spec.tree import Spec

STREAM_WIDTHS, PRODUCT_WIDTHS = 2, 14
"""h's of a block that are kept as the stream between blocks has them, and as products take them."""
PRODUCTS_KEPT, PRODUCTS_BESIDE = 10, 2
"""h's that `ops: cheap` keeps: what its four products and attention return (3 + 1 + 1 + 4 + 1); and those of
them that are only added to the stream."""
BLOCK_MATRICES, BLOCK_VECTORS = 12, 13
"""h^2's of weights and h's of biases and norms in a block."""
EXPANSION = 4
MASKED_PER_BLOCK, MASK_BYTES = 2, 1
SCORES_KEPT = 3


def spec_bytes(spec: Spec, size: Dimensions, on_host: bool) -> ModelBytes:
    """A micro-batch of `spec` through a model of that size; its kernels are the host's, or a device's."""
    tokens, widths = spec.micro_batch * spec.data.seq_len, Widths.of(spec.precision)
    plain = model_bytes(size, tokens, widths)
    if spec.model.dropout == 0:
        return plain
    return _dropped_on_host(plain, size, spec.data.seq_len) if on_host else _dropped(plain)


def model_bytes(size: Dimensions, tokens: int, widths: Widths) -> ModelBytes:
    """A micro-batch of `tokens` tokens through a model of that size, without dropout."""
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
        products_beside=tokens * h * PRODUCTS_BESIDE * widths.compute,
        views=tokens * h * widths.compute,  # attention's output, as the projection after it sees it
        weight_copies=copies,
        expanded=EXPANSION * tokens * h * widths.compute,
        head=stream + 2 * tokens * widths.stream,
    )


def _dropped(plain: ModelBytes) -> ModelBytes:
    """With a byte for each element that may be dropped."""
    mask = plain.tokens * plain.hidden * MASK_BYTES
    return replace(plain, block=plain.block + MASKED_PER_BLOCK * mask, head=plain.head + mask)


def _dropped_on_host(plain: ModelBytes, size: Dimensions, seq_len: int) -> ModelBytes:
    """With noise as wide as what it multiplies, and attention in parts."""
    one, compute = plain.tokens * plain.hidden, plain.widths.compute
    noise = MASKED_PER_BLOCK * one * compute
    scores = plain.tokens * seq_len * size.heads * FP32
    copies = 3 * one * (FP32 - compute)  # of query, key and value, which are let go
    statistics = plain.tokens * size.heads * FP32  # of fused attention
    return replace(
        plain,
        block=plain.block + noise + SCORES_KEPT * scores + copies - statistics,
        block_without_cheap=plain.block_without_cheap + scores - statistics,
        views=0,
        head=plain.head + one * plain.widths.stream,
    )
