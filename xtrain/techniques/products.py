"""What `ops: cheap` keeps of a recomputed block: the outputs of matrix products and of attention.

A dispatch mode sees every operation below autograd. In the forward pass it notes the dear ones' outputs;
in the replay it hands them out, in the same order, instead of computing them again. Everything else
runs both times, also what only one of the passes does, such as fetching weights that lie elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from xtrain.techniques.recompute import NOT_THE_SAME, Contexts

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION = "_scaled_dot_product"
"""torch's names; those of attention's kernels by their beginning."""


def keep_products() -> Contexts:
    """They are dear to compute, and no larger than the rest."""
    kept: list[Kept] = []
    return Keeping(kept), Using(kept)


@dataclass(frozen=True)
class Output:
    """A tensor without its graph, and how often it had been changed in place."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Output:
        kept = alone(tensor)
        return cls(kept, kept._version)

    def unchanged(self) -> torch.Tensor:
        """Another one each time: what a replay is given becomes part of its graph, which must not be kept."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                "a matrix product's output was changed in place, so it cannot be kept; "
                "use memory.checkpointing: {every: 1}"
            )
        return alone(self.tensor)


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without a graph, counting changes in place together with `tensor`."""
    # Down here detach() would start a counter of its own, and changes in place would go unseen.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


@dataclass(frozen=True)
class Kept:
    op: Any
    output: Any


class Keeping(TorchDispatchMode):
    """Around a block's forward pass."""

    def __init__(self, kept: list[Kept]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = op(*args, **(kwargs or {}))
        if is_dear(op, args, kwargs or {}):
            self.kept.append(Kept(op, tree_map_only(torch.Tensor, Output.of, output)))
        return output


class Using(TorchDispatchMode):
    """Around its replay. Kept outputs stay: a retained graph may be replayed again."""

    def __init__(self, kept: list[Kept]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.used = 0

    def __enter__(self) -> Any:
        self.used = 0
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not is_dear(op, args, kwargs or {}):
            return op(*args, **(kwargs or {}))
        if self.used == len(self.kept) or self.kept[self.used].op is not op:
            raise RuntimeError(f"{NOT_THE_SAME}: {op} was not expected")
        self.used += 1
        return tree_map_only(Output, Output.unchanged, self.kept[self.used - 1].output)


def is_dear(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    name = op.overloadpacket.__name__
    return name in PRODUCTS or (name.startswith(ATTENTION) and not draws(op, args, kwargs))


def draws(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether attention draws its dropout itself: left out of the replay, all later draws would be others."""
    names = [argument.name for argument in op._schema.arguments]
    return float({**dict(zip(names, args, strict=False)), **kwargs}.get("dropout_p", 0.0)) > 0
