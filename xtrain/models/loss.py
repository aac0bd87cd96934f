"""Cross-entropy over a vocabulary without ever holding all of the logits.

A batch of 8 x 1024 tokens over 50,257 symbols has 1.6 GB of fp32 logits, and their gradient as much
again. Here the tokens are taken a chunk at a time: logits, loss, and at once the gradients with
respect to the hidden states and the projection, whose sizes do not depend on tokens x vocabulary.
Nothing is computed twice: the backward pass only multiplies by the incoming gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from xtrain.contract import IGNORED_TARGET
from xtrain.models.loss_chunk import LossChunk, chunk_tokens


@dataclass(frozen=True)
class LogitForm:
    """What a model makes of its head's output x: scale * x, or cap * tanh(scale * x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def apply(self, output: torch.Tensor) -> torch.Tensor:
        """The logits; fp32, of any shape."""
        logits = output if self.scale == 1.0 else output * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """The derivative of `apply`, given its result."""
        return self.scale if self.cap is None else self.scale * (1 - (logits / self.cap) ** 2)


PLAIN = LogitForm()
COMPILED_MAY_OVERWRITE = torch.__version__ >= "2.13"
"""Compared as versions. torch 2.11 cannot make C++ of compiled code that overwrites its argument here."""

ChunkArithmetic: TypeAlias = Callable[
    [LogitForm, torch.Tensor, "torch.Tensor | None", torch.Tensor],
    tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"],
]
"""What `loss_and_gradient` is, and what it becomes when it is compiled (xtrain/techniques/compiled.py)."""


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of token losses, in fp32. logits [..., vocabulary], targets [...] with IGNORED_TARGET."""
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED_TARGET, reduction="sum"
    )


def projected_cross_entropy_sum(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk: LossChunk,
    bias: torch.Tensor | None = None,
    form: LogitForm = PLAIN,
    arithmetic: ChunkArithmetic | None = None,
) -> torch.Tensor:
    """Sum of token losses of `form(hidden @ weight.T + bias)`, in fp32.

    hidden [..., width], weight [vocabulary, width], targets [...] with IGNORED_TARGET, bias
    [vocabulary]; `chunk` is the number of tokens whose logits exist at one time, or "none" for all.
    """
    tokens = chunk_tokens(chunk, weight.shape[0])
    if tokens is None:
        return cross_entropy_sum(form.apply(F.linear(hidden, weight, bias).float()), targets)
    rows = hidden.flatten(0, -2)
    loss: torch.Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        rows, weight, bias, targets.flatten(), tokens, form, arithmetic or loss_and_gradient
    )
    return loss


class ChunkedHead(nn.Module):
    """A model's last part, which takes the loss itself: there the projection is at hand."""

    def __init__(self, loss_chunk: LossChunk, form: LogitForm = PLAIN) -> None:
        super().__init__()
        self.loss_chunk = loss_chunk
        self.form = form
        self.arithmetic: ChunkArithmetic = loss_and_gradient

    def loss_sum(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return projected_cross_entropy_sum(
            hidden, weight, targets, self.loss_chunk, bias, self.form, self.arithmetic
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk's logits is softmax - one_hot: it is made in place of the logits.

    Under autocast the products run in the autocast dtype and the softmax in fp32, as the plain
    `linear` and `cross_entropy` would. The weight's gradient is a sum over all tokens, not yet
    divided by their number: it is kept in fp32, where fp16 would overflow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        chunk_tokens: int,
        form: LogitForm,
        arithmetic: ChunkArithmetic,
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden) if wants_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        bias_grad = torch.zeros_like(bias, dtype=torch.float32) if wants_bias and bias is not None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            projection = weight.to(dtype)
            for start in range(0, hidden.shape[0], chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                inputs = hidden[rows].to(dtype)
                losses, gradient, column_sums = arithmetic(form, inputs @ projection.t(), bias, targets[rows])
                total += losses
                if bias_grad is not None and column_sums is not None:
                    bias_grad += column_sums
                if hidden_grad is not None:
                    hidden_grad[rows] = gradient @ projection
                if weight_grad is not None:
                    _add_product(weight_grad, gradient.t(), inputs)
                del gradient  # before the next chunk's
        ctx.gradients = hidden_grad, weight_grad, bias_grad
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place: a second backward must fail
        hidden, weight, bias = (
            None if gradient is None else gradient.float().mul_(upstream).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return hidden, weight, bias, None, None, None, None


def loss_and_gradient(
    form: LogitForm, product: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of a head's products [tokens, vocabulary], which are overwritten where they are fp32.

    Returns the sum of losses, its gradient with respect to the products in their dtype, and with a
    bias the gradient's sums over tokens; sums are fp32.
    """
    dtype, output = product.dtype, product.float()
    del product  # in 16 bits the output has memory of its own
    if bias is not None:
        output += bias
    logits = form.apply(output)
    slope = form.slope(logits)
    counted = (targets != IGNORED_TARGET).unsqueeze(1).float()
    index = targets.clamp(min=0).unsqueeze(1)
    target_logits = logits.gather(1, index)
    largest = logits.amax(dim=1, keepdim=True)
    if COMPILED_MAY_OVERWRITE or not torch.compiler.is_compiling():
        gradient = logits.sub_(largest).exp_()  # in place: nothing else of this size is made
    else:
        gradient = logits.sub(largest).exp_()
    total = gradient.sum(dim=1, keepdim=True)
    losses = ((total.log() + largest - target_logits) * counted).sum()
    gradient.mul_(counted / total)
    _subtract_one_hot(gradient, index, counted)
    if form != PLAIN:
        gradient.mul_(slope)
    return losses, gradient.to(dtype), None if bias is None else gradient.sum(dim=0)


def _subtract_one_hot(gradient: torch.Tensor, index: torch.Tensor, counted: torch.Tensor) -> None:
    """Take `counted` [rows, 1] from `gradient` [rows, vocabulary] in the column that `index` [rows, 1] names.

    It touches one number a row. A compiler would split its loop there, and gets a comparison instead.
    """
    if torch.compiler.is_compiling():
        columns = torch.arange(gradient.shape[1], device=gradient.device)
        gradient.sub_(torch.where(columns == index, counted, 0.0))
    else:
        gradient.scatter_add_(1, index, -counted)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif adds_unrounded(left.device, left.dtype):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


@cache
def adds_unrounded(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrices of this 16-bit format can be multiplied into an fp32 sum there, in one operation.

    Then the product is neither rounded nor stored. It is tried out once: torch has it on some devices, and
    takes an fp32 sum only from some version on.
    """
    factor, total = torch.ones(8, 8, dtype=dtype, device=device), torch.ones(8, 8, device=device)
    try:
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 9.0).all())
