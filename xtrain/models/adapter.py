"""Gives a model that is not ours the (tokens, targets) -> loss sum that engines call."""

from __future__ import annotations

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from xtrain.errors import RunFailed, XtrainError, described
from xtrain.models.loss import PLAIN, ChunkedHead, LogitForm, cross_entropy_sum
from xtrain.models.loss_chunk import LossChunk


class Adapter(nn.Module):
    """Wraps the module `model`, whose parameters get the prefix `model.`; `origin` names it for people."""

    def __init__(self, model: nn.Module, origin: str) -> None:
        super().__init__()
        self.model = model
        self.origin = origin

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        try:
            loss = self.loss_sum(tokens, targets)
        except (XtrainError, MemoryError):
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, RuntimeError) and "memory" in str(error).lower():
                raise  # a full device is the engine's to tell
            raise RunFailed(
                f"the model of {self.origin} failed in its forward: {described(error)}"
            ) from error
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RunFailed(
                f"the loss of the model of {self.origin} has no gradient: its forward detaches its logits, "
                "makes them under torch.no_grad, or uses none of its trained weights"
            )
        return loss

    @abstractmethod
    def loss_sum(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: ...


class LogitsLoss(Adapter):
    """For a module whose output is logits: a tensor, an object with `.logits`, or a tuple of them first.

    `symbols` are those of the data, all of which the logits must be over; 0 where they are not known.
    """

    def __init__(self, model: nn.Module, origin: str, symbols: int = 0) -> None:
        super().__init__(model, origin)
        self.symbols = symbols

    def loss_sum(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        output = self.model(tokens)
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
        if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != targets.shape:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise RunFailed(
                f"the model of {self.origin} returned {found} for tokens {tuple(tokens.shape)}; "
                "expected logits [batch, seq, vocabulary]"
            )
        if logits.shape[-1] < self.symbols:
            raise RunFailed(
                f"the model of {self.origin} returned logits over {logits.shape[-1]} symbols, but the data "
                f"has {self.symbols}; expected as many or more"
            )
        return cross_entropy_sum(logits, targets)


class LossHead(ChunkedHead):
    """Stands where a model had its head, an nn.Linear, with the same parameters under the same names.

    hidden [batch, seq, width] -> the head's output, or with targets the sum of token losses. The loss
    is taken here, inside the module that owns the projection, so that an engine which gathers
    parameters module by module has it at hand.
    """

    def __init__(self, linear: nn.Linear, loss_chunk: LossChunk, form: LogitForm = PLAIN) -> None:
        super().__init__(loss_chunk, form)
        self.weight = linear.weight
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        if targets is None:
            return F.linear(hidden, self.weight, self.bias)
        return self.loss_sum(hidden, self.weight, targets, self.bias)


class HeadLoss(Adapter):
    """For a module of the transformers library in which the place of its head, `head`, is a LossHead.

    The library's own head is never run: full logits never exist.
    """

    def __init__(self, model: nn.Module, head: str, origin: str) -> None:
        super().__init__(model, origin)
        self.head = head

    def loss_sum(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        hidden = self.model.base_model(input_ids=tokens).last_hidden_state  # type: ignore[operator]
        loss: torch.Tensor = self.model.get_submodule(self.head)(hidden, targets)
        return loss
