"""Cross-entropy over a vocabulary without ever holding all of the logits.

A batch of 8 x 1024 tokens over 50,257 symbols has 1.6 GB of fp32 logits, and their gradient as much
again. Here the tokens are taken a chunk at a time: logits, loss, and at once the gradients with
respect to the hidden states and the projection, whose sizes do not depend on tokens x vocabulary.
Nothing is computed twice: the backward pass only multiplies by the incoming gradient.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from xtrain.contract import IGNORED_TARGET

AUTO_CHUNK_BYTES = 128 * 2**20
"""fp32 logits of one chunk under `loss_chunk: auto`, at most."""
AUTO_CHUNK_TOKENS = 2048
"""And its tokens: enough for a full matrix product, too few to overflow an fp16 sum over them."""

LossChunk = int | Literal["auto", "none"]


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of token losses, in fp32. logits [..., vocabulary], targets [...] with IGNORED_TARGET."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )


def projected_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: LossChunk
) -> torch.Tensor:
    """Sum of token losses of `hidden @ weight.T`, in fp32.

    hidden [..., width], weight [vocabulary, width], targets [...] with IGNORED_TARGET; `chunk` is
    the number of tokens whose logits exist at one time, or "none" for all of them.
    """
    if chunk == "none":
        return cross_entropy_sum(F.linear(hidden, weight), targets)
    if chunk == "auto":
        chunk = max(1, min(AUTO_CHUNK_TOKENS, AUTO_CHUNK_BYTES // (4 * weight.shape[0])))
    rows = hidden.flatten(0, -2)
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(rows, weight, targets.flatten(), chunk)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk's logits is softmax - one_hot: it is made in place of the logits.

    Under autocast the products run in the autocast dtype and the softmax in fp32, as the plain
    `linear` and `cross_entropy` would. The weight's gradient is a sum over all tokens, not yet
    divided by their number: it is kept in fp32, where fp16 would overflow.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            projection = weight.to(dtype)
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                inputs = hidden[rows].to(dtype)
                logits = (inputs @ projection.t()).float()
                losses, gradient = _loss_and_gradient(logits, targets[rows])
                total += losses
                gradient = gradient.to(dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] = gradient @ projection
                if weight_grad is not None:
                    _add_product(weight_grad, gradient.t(), inputs)
        ctx.gradients = hidden_grad, weight_grad
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.gradients
        ctx.gradients = None  # scaled in place below: a second backward must fail, not be wrong
        if hidden_grad is not None:
            hidden_grad = (hidden_grad.float() * upstream).to(hidden_grad.dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(upstream).to(ctx.weight_dtype)
        return hidden_grad, weight_grad, None, None


def _loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of losses and its gradient for fp32 logits [tokens, vocabulary], which are overwritten."""
    counted = (targets != IGNORED_TARGET).unsqueeze(1)
    index = targets.clamp(min=0).unsqueeze(1)
    norm = logits.logsumexp(dim=1, keepdim=True)
    losses = ((norm - logits.gather(1, index)) * counted).sum()
    gradient = logits.sub_(norm).exp_()
    gradient.scatter_add_(1, index, torch.full_like(norm, -1.0))
    return losses, gradient.mul_(counted)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
