"""Gradients on the CPU: each leaves its device as soon as it is final (RALO).

Autograd calls a hook when a backward pass has put the last contribution into a parameter's gradient. The
gradient is sent to the CPU there and then, while the rest of the backward pass goes on, and its memory on
the device is free again: never more than a few gradients are there at one time. With accumulation the
micro-batches are summed on the CPU, in the gradient's own dtype, just as autograd would have on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from threading import Lock

import torch
from torch import nn

from .transfers import HOST, ToHost, to_host


class HostGradients:
    """The gradients of parameters that are on other devices. Those on the CPU stay as autograd has them."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.sums: dict[nn.Parameter, torch.Tensor] = {}
        self.underway: deque[tuple[nn.Parameter, ToHost]] = deque()
        self.lock = Lock()  # autograd has a thread for each device
        for parameter in parameters:
            if parameter.requires_grad and parameter.device != HOST:
                parameter.register_post_accumulate_grad_hook(self._send)

    def take(self, parameter: nn.Parameter) -> torch.Tensor | None:
        """Its gradient, on the CPU, which is forgotten here."""
        with self.lock:
            while self.underway:
                self._add()
        return self.sums.pop(parameter, parameter.grad)

    def clear(self) -> None:
        with self.lock:
            self.underway.clear()
            self.sums.clear()

    def _send(self, parameter: torch.Tensor) -> None:
        """What autograd calls."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        with self.lock:
            self.underway.append((parameter, to_host(parameter.grad)))
            parameter.grad = None
            while self.underway and self.underway[0][1].done():
                self._add()

    def _add(self) -> None:
        parameter, sent = self.underway.popleft()
        arrived = sent.result()
        if parameter in self.sums:
            self.sums[parameter] += arrived
        else:
            self.sums[parameter] = arrived
