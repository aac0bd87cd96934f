"""Autocast on the simulated device: the CPU's rules, as far as transformers meet them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.simulated.counting import NAME
from tests.simulated.tensors import is_simulated

aten = torch.ops.aten
_AUTOCAST = torch._C.DispatchKeySet(torch._C._dispatch_key_parse("AutocastPrivateUse1"))
IN_16_BIT = (
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.scaled_dot_product_attention.default,
)
IN_FP32 = (aten.cross_entropy_loss.default, aten.nll_loss.default, aten.mse_loss.default)

_rules = torch.library.Library("aten", "IMPL")
_others = torch.library.Library("_", "IMPL")


def register() -> None:
    _others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for op in IN_16_BIT:
        _rules.impl(op, _casting(op, None), "AutocastPrivateUse1")
    for op in IN_FP32:
        _rules.impl(op, _casting(op, torch.float32), "AutocastPrivateUse1")


def _casting(op: Any, fixed: torch.dtype | None) -> Any:
    """`op` after a cast of its floating-point tensors to `fixed`, or to the dtype that autocast was given."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = fixed or torch.get_autocast_dtype(NAME)

        def cast(value: Any) -> Any:
            eligible = isinstance(value, torch.Tensor) and is_simulated(value) and value.is_floating_point()
            return value.to(dtype) if eligible else value

        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel
