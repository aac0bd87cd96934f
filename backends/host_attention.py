"""Attention's backward pass on the host in 16 bits: that of short sequences is computed in fp32.

torch's kernel takes 32 queries at a time where a sequence has fewer than 192 tokens, and its bf16 matrix
products are too small there to pay (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, torch 2.13). The same
kernel in fp32 takes half the time or less, copies included, and its gradients are nearer to the exact ones.
The forward pass, what it keeps, and longer sequences stay as they are.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from functools import cache
from typing import Any

import torch

OPERATOR = "_scaled_dot_product_flash_attention_for_cpu_backward"
LARGER_BLOCKS_FROM = 192
"""Tokens."""
COPY_BYTES = 4 * 2**20
"""Of one tensor in fp32, at most, unless a single sequence has more."""
TENSORS = 6
"""The operator's first arguments: gradient, query, key, value, output [batch, heads, tokens, width], and
logsumexp [batch, heads, tokens]. Dropout and causal follow."""

_library = torch.library.Library("aten", "IMPL")


@cache
def quicken_attention() -> None:
    """For all models of this process; does nothing where torch cannot hand out its kernel."""
    if not hasattr(torch.library, "get_kernel"):
        return
    kernel = torch.library.get_kernel(f"aten::{OPERATOR}", "CPU").call_boxed

    def backward(keys: Any, *arguments: Any, **settings: Any) -> Any:
        tensors, others = arguments[:TENSORS], arguments[TENSORS:]
        query, key, value = tensors[1:4]
        if not _gains(query, key, value, settings.get("attn_mask")):
            return kernel(keys, *arguments, **settings)
        sequences = max(1, COPY_BYTES // (4 * query[0].numel()))
        parts = zip(*(tensor.split(sequences) for tensor in tensors), strict=True)
        gradients = (
            kernel(keys, *(tensor.float() for tensor in part), *others, **settings) for part in parts
        )
        rounded = [[gradient.to(query.dtype) for gradient in three] for three in gradients]
        return rounded[0] if len(rounded) == 1 else [torch.cat(parts) for parts in zip(*rounded, strict=True)]

    # torch warns that a kernel is overridden, which is meant; older ones refuse where another library did it
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore", UserWarning)
        _library.impl(OPERATOR, backward, "CPU", with_keyset=True)


def _gains(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether it is as tried: 16 bits, one key and value a query, short, and no mask but the causal one."""
    alike = query.shape == key.shape == value.shape and mask is None
    return alike and query.element_size() == 2 and query.shape[2] < LARGER_BLOCKS_FROM
