"""A model without its numbers, to be looked at while the model itself trains."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn

from xtrain.errors import described


def outline(model: nn.Module) -> nn.Module | str:
    """A copy of `model` whose parameters and buffers have shapes alone; or why it cannot be copied.

    Tensors that stand elsewhere in a module are copied as they are.
    """
    try:
        shapes = {id(t): _shape(t) for t in chain(model.parameters(), model.buffers())}
        return copy.deepcopy(model, shapes)
    except Exception as error:  # whatever the user's modules do when they are copied
        return f"the model cannot be copied: {described(error)}"


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    """Asks for nothing but shape and dtype: the numbers may be on other processes."""
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
