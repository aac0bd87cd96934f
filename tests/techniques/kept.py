"""How many bytes a forward pass leaves behind for the backward pass, whoever keeps them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Made(TorchDispatchMode):
    """Weak references to all memory that operations made; views of older tensors are not theirs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.older: set[int] = set()

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = (args, kwargs or {})
        self.older |= {storage._cdata for storage in _storages(arguments) if storage._cdata not in self.made}
        output = op(*args, **(kwargs or {}))
        for storage in _storages(output):
            if storage._cdata not in self.older:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return output


def _storages(tree: object) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def kept_bytes(forward: Callable[[], torch.Tensor]) -> int:
    """Bytes that `forward` made and that are alive after it, its result among them."""
    with _Made() as mode:
        result = forward()
    alive: int = sum(size for storage, size in mode.made.values() if not storage.expired())
    del result
    return alive
