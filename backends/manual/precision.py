"""Two families of mixed precision, each in a few lines.

Autocast: the weights stay in fp32, matrix products run in 16 bit (torch.autocast picks the operations).
16-bit weights: model and gradients are 16 bit, and the optimizer keeps an fp32 *master copy* of every
weight, without which updates below the 16-bit resolution would be lost (Micikevicius et al. 2018); the
copies are in weights.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from xtrain.spec.tree import Precision

from ..dtypes import DTYPES


@contextmanager
def autocast(precision: Precision, devices: Iterable[torch.device]) -> Iterator[None]:
    """The context of a forward pass: a 16-bit autocast where the weights are fp32 and the work is not."""
    with ExitStack() as stack:
        if precision.dtype != precision.weights:
            for kind in {device.type for device in devices}:
                stack.enter_context(torch.autocast(kind, DTYPES[precision.dtype]))
        yield


def round_weights(model: nn.Module, precision: Precision) -> None:
    """The model's weights, in place, in the format that they are computed with."""
    model.to(DTYPES[precision.weights])
