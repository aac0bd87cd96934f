"""Gives a model of logits the (tokens, targets) -> loss sum that engines call."""

from __future__ import annotations

import torch
from torch import nn

from xtrain.errors import RunFailed, described
from xtrain.models.loss import cross_entropy_sum


class LogitsLoss(nn.Module):
    """Wraps a module whose output is logits: a tensor, an object with `.logits`, or a tuple of them first."""

    def __init__(self, model: nn.Module, origin: str) -> None:
        super().__init__()
        self.model = model
        self.origin = origin

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        try:
            output = self.model(tokens)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RunFailed(
                f"the model of {self.origin} failed in its forward: {described(error)}"
            ) from error
        except RuntimeError as error:
            if "memory" in str(error).lower():  # a full device is the engine's to tell
                raise
            raise RunFailed(
                f"the model of {self.origin} failed in its forward: {described(error)}"
            ) from error
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
        if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != targets.shape:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise RunFailed(
                f"the model of {self.origin} returned {found} for tokens {tuple(tokens.shape)}; "
                "expected logits [batch, seq, vocabulary]"
            )
        return cross_entropy_sum(logits, targets)
