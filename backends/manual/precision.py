"""Two families of mixed precision, each in a few lines.

Autocast: the weights stay in fp32, matrix products run in 16 bit (torch.autocast picks the operations).
16-bit weights: model and gradients are 16 bit, and the optimizer keeps an fp32 *master copy* of every
weight, without which updates below the 16-bit resolution would be lost (Micikevicius et al. 2018).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import nn

from xtrain.spec.tree import Precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass: a 16-bit autocast where the weights are fp32 and the work is not."""
    enabled = precision.dtype != precision.weights
    return torch.autocast(device.type, DTYPES[precision.dtype] if enabled else None, enabled=enabled)


class Weights:
    """fp32 weights: what the model computes with is what the optimizer updates."""

    def __init__(self, model: nn.Module) -> None:
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.updated: dict[str, nn.Parameter] = self.trained

    def gradients(self) -> list[torch.Tensor]:
        """fp32, on the tensors that the optimizer updates; parameters without a gradient left out."""
        return [p.grad for p in self.updated.values() if p.grad is not None]

    def masters(self) -> Iterable[torch.Tensor]:
        """fp32 copies beside the model's own weights."""
        return ()

    def publish(self) -> None:
        """Make the update visible to the model."""

    def clear_gradients(self) -> None:
        for parameter in (*self.trained.values(), *self.updated.values()):
            parameter.grad = None


class MasterWeights(Weights):
    """16-bit weights with an fp32 master copy of each.

    The masters start from the *rounded* weights, as DeepSpeed's do: model and masters agree from the
    first step on. The optimizer must be built over `updated`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        model.to(dtype)
        super().__init__(model)
        self.updated = {name: nn.Parameter(p.detach().float()) for name, p in self.trained.items()}

    def gradients(self) -> list[torch.Tensor]:
        for name, parameter in self.trained.items():
            if parameter.grad is not None:
                self.updated[name].grad = parameter.grad.float()
                parameter.grad = None
        return super().gradients()

    def masters(self) -> Iterable[torch.Tensor]:
        return self.updated.values()

    @torch.no_grad()
    def publish(self) -> None:
        copies: list[torch.Tensor] = list(self.trained.values())
        torch._foreach_copy_(copies, list(self.updated.values()))


def hold_weights(model: nn.Module, precision: Precision) -> Weights:
    """The weights of `model` in the form that the spec asks for; converts the model in place."""
    if precision.weights == "fp32":
        return Weights(model)
    return MasterWeights(model, DTYPES[precision.weights])
