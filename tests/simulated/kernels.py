"""The simulated device's kernels: one fallback runs any operation on the CPU, a few are written out."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from tests.simulated import random
from tests.simulated.counting import TRAFFIC
from tests.simulated.tensors import is_simulated, on_cpu, on_device, refuse_float64

aten = torch.ops.aten
_CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_OWN_ON_CPU = (aten.native_layer_norm.default, aten.native_group_norm.default)
"""Composite for a device without kernels, with other roundings than the CPU's."""
_VIEWS = (aten.as_strided.default, aten.view.default, aten._reshape_alias.default, aten.unfold.default)


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operation: its CPU kernel over the same memory."""
    index = _device_index(op, (args, kwargs))
    originals: dict[int, torch.Tensor] = {}

    def lower(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and is_simulated(value):
            seen = on_cpu(value) if value.numel() else torch.empty_like(value, device="cpu")
            originals[id(seen)] = value
            return seen
        return torch.device("cpu") if isinstance(value, torch.device) else value

    def lift(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return originals[id(value)] if id(value) in originals else on_device(value, index)

    args, kwargs = tree_map(lower, args), tree_map(lower, kwargs)
    memory = {seen.data_ptr() for seen in _tensors((args, kwargs)) if seen.numel()}
    with random.own_state(op, index):
        result = op(*args, **kwargs)
    for output in _tensors(result):
        if (empty := originals.get(id(output))) is not None and empty.shape != output.shape:
            empty.data = on_device(output, index)  # an `out` that the kernel gave its size
        if id(output) not in originals and output.numel() and output.data_ptr() in memory:
            raise NotImplementedError(f"{op} returns a view: give the simulated device a kernel for it")
    return tree_map(lift, result)


def view(op: Any) -> Any:
    """Views share storage and touch no bytes, so the CPU's kernel serves any device."""

    def kernel(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen: torch.Tensor = op.redispatch(_CPU_KERNELS, tensor, *args, **kwargs)
        return seen

    return kernel


def empty(
    size: list[int],
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    refuse_float64(dtype)
    made = torch.empty(
        size, dtype=dtype, memory_format=memory_format or torch.contiguous_format, device="cpu"
    )
    return on_device(made, _index(device))


def empty_strided(
    size: list[int],
    stride: list[int],
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> torch.Tensor:
    refuse_float64(dtype)
    return on_device(torch.empty_strided(size, stride, dtype=dtype, device="cpu"), _index(device))


def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """The one way in and out, and between two devices: counted."""
    if source.device != target.device:
        TRAFFIC.crossed(source.device, target.device, source.numel() * target.element_size())
    lowered = [on_cpu(tensor) if is_simulated(tensor) else tensor for tensor in (source, target)]
    lowered[1].copy_(lowered[0])
    return target


def read_number(tensor: torch.Tensor) -> Any:
    """`.item()`: the host waits for the device."""
    TRAFFIC.numbers_read += 1
    return on_cpu(tensor).item()


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Fused where the CPU's kernel is, so that the arithmetic is the CPU's."""
    if dropout_p or enable_gqa:
        output, _ = aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    else:
        output, _ = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )
    return output  # type: ignore[no-any-return]


def _index(device: torch.device | None) -> int:
    return device.index if device is not None and device.index is not None else 0


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _device_index(op: Any, arguments: Any) -> int:
    """Of the one device that all tensors are on; numbers (0-dim CPU tensors) may come along."""
    tensors = _tensors(arguments)
    devices = {tensor.device for tensor in tensors if is_simulated(tensor) or tensor.ndim > 0}
    if len(devices) > 1:
        found = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"{op}: expected all tensors on one device, found {found}")
    named = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.device)]
    return _index(next(iter([*devices, *named]), None))


_backend = torch.library.Library("aten", "IMPL")
_fallback = torch.library.Library("_", "IMPL")


def register() -> None:
    """Everything below autograd and autocast."""
    _fallback.fallback(run, "PrivateUse1")
    for op in _VIEWS:
        _backend.impl(op, view(op), "PrivateUse1")
    for op in _OWN_ON_CPU:
        _backend.impl(op, partial(run, op), "PrivateUse1")
    _backend.impl("empty.memory_format", empty, "PrivateUse1")
    _backend.impl("empty_strided", empty_strided, "PrivateUse1")
    _backend.impl("_copy_from", copy_from, "PrivateUse1")
    _backend.impl("_local_scalar_dense", read_number, "PrivateUse1")
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        _backend.impl("scaled_dot_product_attention", attention, key)
