"""What the model computes with, and what the optimizer updates: one and the same where it can be.

A weight has an fp32 *master copy* for the optimizer where it has 16 bits itself (precision.py), or where the
optimizer is on the CPU and the weight is not (offload). Both ask the same: gradients go to the masters
before an update, and the updated masters come back, rounded, after it.
"""

from __future__ import annotations

import torch
from torch import nn

from xtrain.spec.tree import Offload

from .gradients import HostGradients
from .transfers import HOST, copy_over, to_host


class Weights:
    """The trained weights of a model. The optimizer must be built over `updated`.

    Masters start from the rounded weights, as DeepSpeed's do: both agree from the first step on.
    """

    def __init__(
        self, model: nn.Module, optimizer_on: torch.device | None = None, on_host: HostGradients | None = None
    ) -> None:
        """`optimizer_on`: the device of all that is updated; None leaves each beside its weight.

        `on_host` has the gradients; None where they stay on the weights.
        """
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.updated = {name: _updated(p, optimizer_on or p.device) for name, p in self.trained.items()}
        self.on_host = on_host
        pairs = zip(self.trained.values(), self.updated.values(), strict=True)
        self.copied = [(weight, master) for weight, master in pairs if weight is not master]
        """Weights and their masters, where there are two."""
        self.widened: dict[str, torch.Tensor] = {}
        """Memory on the CPU for the fp32 form of gradients that come there in 16 bits."""

    def gradients(self) -> list[torch.Tensor]:
        """fp32, on the tensors that the optimizer updates; parameters without a gradient left out.

        One at a time changes its place: at no moment are there two whole sets.
        """
        made = [self.hand_over(name, keeps_memory=True) for name in self.trained]
        return [gradient for gradient in made if gradient is not None]

    def hand_over(self, name: str, keeps_memory: bool = False) -> torch.Tensor | None:
        """One gradient, now on what the optimizer updates and nowhere else; None where there is none.

        With `keeps_memory` a later one of that name is put into the same memory, where it is sent to the CPU.
        """
        parameter, updated = self.trained[name], self.updated[name]
        gradient = self.on_host.take(parameter) if self.on_host else parameter.grad
        if gradient is None:
            return None
        parameter.grad = None
        there = to_host(gradient).result() if updated.device == HOST else gradient.to(updated.device)
        sent = parameter.device != updated.device == HOST
        updated.grad = self._widen(name, there) if keeps_memory and sent else there.float()
        return updated.grad

    def _widen(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        """In fp32, in memory that is kept: fresh pages for a whole set would cost as much as the update."""
        if gradient.dtype == torch.float32:
            return gradient
        if name not in self.widened:
            self.widened[name] = torch.empty_like(gradient, dtype=torch.float32)
        return self.widened[name].copy_(gradient)

    def held_gradients(self) -> list[torch.Tensor]:
        """Those that exist now, wherever they are."""
        weights = (*self.trained.values(), *self.updated.values())
        on_host = self.on_host.sums.values() if self.on_host else ()
        return [*(p.grad for p in weights if p.grad is not None), *on_host]

    def masters(self) -> list[nn.Parameter]:
        """fp32 copies beside the model's own weights."""
        return [master for _, master in self.copied]

    @torch.no_grad()
    def publish(self) -> None:
        """Make the update visible to the model."""
        beside = [(weight, master) for weight, master in self.copied if weight.device == master.device]
        if beside:
            weights, masters = zip(*beside, strict=True)
            torch._foreach_copy_(list(weights), list(masters))
        for weight, master in self.copied:
            if weight.device != master.device:
                copy_over(master, weight)

    @torch.no_grad()
    def publish_one(self, name: str) -> None:
        """Make the update of one weight visible to the model."""
        if (weight := self.trained[name]) is not (master := self.updated[name]):
            copy_over(master, weight)

    def clear_gradients(self) -> None:
        for parameter in (*self.trained.values(), *self.updated.values()):
            parameter.grad = None
        if self.on_host:
            self.on_host.clear()


def _updated(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if parameter.dtype == torch.float32 and parameter.device == device:
        return parameter
    return nn.Parameter(parameter.detach().to(device).float())


def hold_weights(model: nn.Module, offload: Offload) -> Weights:
    """The weights of a model whose parts are where they are to be, with what of them is on the CPU."""
    on_host = HostGradients(model.parameters()) if offload.gradients.enabled else None
    return Weights(model, HOST if offload.optimizer.enabled else None, on_host)
