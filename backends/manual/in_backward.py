"""The update within the backward pass: each weight is updated as soon as its own gradient is final.

Autograd calls a hook when a backward pass has put the last contribution into a parameter's gradient. The
optimizer takes its step on that one parameter there and then, and the gradient is let go of: a few exist at
a time, never a whole set (Lv et al. 2023; torchtune's `optimizer_in_bwd`). Nothing later in the pass needs
the old weight: what does, contributes to its gradient, and autograd has waited for it.

What has to be known of all gradients before the first update cannot be had: clipping, the sum over several
passes, whether fp16 overflowed, what a guard says. xtrain/spec/check_memory.py refuses each by name. The
global norm is still reported: it is put together afterwards, of a norm kept from each gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from .clipping import norm_of_norms
from .devices import by_device
from .optimizer import set_learning_rate
from .weights import Weights

Build = Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer]
"""An optimizer over some of the weights, by name."""


class UpdateInBackward:
    """From its making on, a backward pass updates every weight that it makes a gradient of."""

    def __init__(self, weights: Weights, optimizer: torch.optim.Optimizer, build: Build) -> None:
        """`optimizer` is over all weights: it keeps the state of the small ones that `build` makes."""
        self.weights = weights
        self.lr = 0.0
        """Of the next update."""
        self.norms: dict[str, torch.Tensor] = {}
        """Of the gradients of this pass, 0-dim, each where its gradient was."""
        for name, parameter in weights.trained.items():
            own = build({name: weights.updated[name]})
            own.state = optimizer.state
            parameter.register_post_accumulate_grad_hook(partial(self._update, name, own))

    def norm(self) -> torch.Tensor:
        """The global norm of the gradients of the last pass: a 0-dim fp32 tensor."""
        made = [self.norms[name] for name in self.weights.trained if name in self.norms]
        self.norms.clear()
        return norm_of_norms([norm_of_norms(group) for group in by_device(made)])

    def _update(self, name: str, own: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
        """What autograd calls, without a graph, on the thread of the parameter's device."""
        gradient = self.weights.hand_over(name)
        assert gradient is not None
        self.norms[name] = torch.linalg.vector_norm(gradient)
        set_learning_rate(own, self.lr)
        own.step()
        self.weights.updated[name].grad = None
        self.weights.publish_one(name)
