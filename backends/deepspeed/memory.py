"""What one rank's device holds of the training state, read off DeepSpeed's own partitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


class Ledger:
    """Bytes of storages on one device, each counted once: the first category that names it has it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: set[int] = set()

    def bytes(self, tensors: Iterable[Any]) -> int:
        return sum(self._new_bytes(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))

    def _new_bytes(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if tensor.device.type != self._device.type or not storage.nbytes() or place in self._seen:
            return 0
        self._seen.add(place)
        return storage.nbytes()


def categories(engine: Any, flat: list[torch.Tensor], device: torch.device) -> dict[str, int]:
    """By MEMORY_CATEGORIES, as it is now; `other` is what gradients are reduced in.

    `flat` is what the optimizer updates on this rank. In fp32 at stage 3 that is the weights' own memory,
    so there is no master. What was offloaded to the host is not on a GPU, and what is on a drive is
    nowhere; on the CPU the host is the device.
    """
    ledger = Ledger(device)
    zero = engine.optimizer
    base = getattr(zero, "optimizer", zero)
    return {
        "parameters": ledger.bytes(_weights(engine.module)),
        "master": ledger.bytes(flat),
        "gradients": ledger.bytes(_gradients(engine.module, zero, flat)),
        "optimizer": ledger.bytes(value for tensor in flat for value in base.state.get(tensor, {}).values()),
        "other": ledger.bytes(_buckets(zero)),
    }


def _weights(module: torch.nn.Module) -> Iterator[Any]:
    for parameter in module.parameters():
        yield getattr(parameter, "ds_tensor", None)
        yield parameter.data


def _gradients(module: torch.nn.Module, zero: Any, flat: list[torch.Tensor]) -> Iterator[Any]:
    yield getattr(zero, "grad_partitions_flat_buffer", None)
    for tensor in (*flat, *module.parameters()):
        yield tensor.grad
    for averaged in getattr(zero, "averaged_gradients", {}).values():
        yield from averaged or ()


def _buckets(zero: Any) -> Iterator[Any]:
    for bucket in getattr(zero, "ipg_buckets", {}).values():
        yield from bucket.buffer if isinstance(bucket.buffer, list) else (bucket.buffer,)
