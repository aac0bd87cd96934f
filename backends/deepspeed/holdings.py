"""What one rank holds of the training state from step to step, read off DeepSpeed's own partitions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from xtrain.contract import Holdings


def holdings(engine: Any, flat: list[torch.Tensor]) -> Holdings:
    """By category; `other` is what gradients are reduced in.

    `flat` is what the optimizer updates on this rank: at stage 0 the weights themselves, from stage 1 on a
    copy, also in fp32. Of what is on a drive only the buffers are in memory.
    """
    zero = engine.optimizer
    state = getattr(zero, "optimizer", zero).state
    found = {
        "parameters": _weights(engine.module),
        "master": flat if engine.zero_optimization() else (),
        "gradients": _gradients(engine.module, zero, flat),
        "optimizer": (value for tensor in flat for value in state.get(tensor, {}).values()),
        "other": _buckets(zero),
    }
    return {
        category: [tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.numel()]
        for category, tensors in found.items()
    }


def _weights(module: torch.nn.Module) -> Iterator[Any]:
    for parameter in module.parameters():
        yield getattr(parameter, "ds_tensor", None)
        yield parameter


def _gradients(module: torch.nn.Module, zero: Any, flat: list[torch.Tensor]) -> Iterator[Any]:
    yield getattr(zero, "grad_partitions_flat_buffer", None)
    for tensor in (*flat, *module.parameters()):
        yield tensor.grad
    for averaged in getattr(zero, "averaged_gradients", {}).values():
        yield from averaged or ()


def _buckets(zero: Any) -> Iterator[Any]:
    for bucket in getattr(zero, "ipg_buckets", {}).values():
        yield from bucket.buffer if isinstance(bucket.buffer, list) else (bucket.buffer,)
