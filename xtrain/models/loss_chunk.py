"""How many tokens' logits exist at one time. No torch: the planner asks too."""

from __future__ import annotations

from typing import Literal

AUTO_CHUNK_BYTES = 128 * 2**20
"""fp32 logits of one chunk under `loss_chunk: auto`, at most."""
AUTO_CHUNK_TOKENS = 1024
"""And its tokens: enough for a full matrix product, too few to overflow an fp16 sum over them."""

LossChunk = int | Literal["auto", "none"]


def chunk_tokens(chunk: LossChunk, vocab_size: int) -> int | None:
    """Tokens per chunk; None for all at once."""
    if chunk == "none":
        return None
    if chunk == "auto":
        return max(1, min(AUTO_CHUNK_TOKENS, AUTO_CHUNK_BYTES // (4 * vocab_size)))
    return chunk
