"""Where a step's memory goes: every storage alive in one step, by category and by place.

Allocators count bytes, not what they are for. Here one step is taken under a dispatch mode that sees each
operation's inputs and outputs. A storage is counted once, from the operation that made it until it is freed:

- what the engine holds is what it says it is (`parameters`, `master`, `gradients`, `optimizer`);
- what a forward pass makes is `activations`, also when it is repeated in the backward pass;
- what is as wide as the vocabulary is `logits`; the width is learned from the loss;
- a parameter's gradient is `gradients` from the moment autograd hands it over;
- the rest is `other`: batches, gradients of activations, temporaries of the update.

A category is often known only after a storage was made. It is then corrected back to its birth, in the
peak too. What a kernel uses inside and frees before it returns is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtrain.contract import MEMORY_CATEGORIES, ByPlace, Holdings, Phase

_LOSS_OPS = (torch.ops.aten._log_softmax.default, torch.ops.aten.logsumexp.default)
"""Their input is logits, in every cross-entropy."""
_PICK = torch.ops.aten.scatter_add_.default
"""With one index a row: the loss by chunks (xtrain/models/loss.py) takes 1 from its targets' shares."""


MADE = ("activations", "other")
"""What a storage is until somebody says what it is."""


def count_bytes(holdings: Holdings) -> ByPlace:
    """Bytes now by place and category; of a storage that several tensors share, once."""
    found: dict[str, dict[str, int]] = {}
    seen: set[int] = set()
    for category, tensors in holdings.items():
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                place = found.setdefault(str(tensor.device), dict.fromkeys(holdings, 0))
                place[category] += storage.nbytes()
    return found


@dataclass
class _Storage:
    place: str
    bytes: int
    category: str
    width: int
    """Last dimension of the tensor it was made for."""
    born: int


@dataclass
class _Place:
    """One device's bytes by category: now, and when there were most."""

    live: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    peak_time: int = 0


class Ledger(TorchDispatchMode):
    """Take a step inside `with ledger.open():` with the ledger as its trace; then read `peaks`."""

    timed = False

    def __init__(self, holdings: Callable[[], Holdings]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._holdings = holdings
        self._storages: dict[int, _Storage] = {}
        self._finalizers: dict[int, weakref.finalize[Any, Any]] = {}
        self._places: dict[str, _Place] = {}
        self._phase: Phase | None = None
        self._vocabulary: int | None = None
        self._time = 0

    @property
    def peaks(self) -> ByPlace:
        """Bytes by category at each place's fullest moment."""
        return {
            name: {key: place.peak[key] for key in MEMORY_CATEGORIES if place.peak[key]}
            for name, place in self._places.items()
        }

    @contextmanager
    def open(self) -> Iterator[None]:
        """Once. Afterwards nothing of the step, and no tensor of the engine, is kept alive by the ledger."""
        with ExitStack() as stack:
            stack.callback(self._close)
            self._claim_holdings()
            for tensor in self._holdings().get("parameters", ()):
                if tensor.requires_grad:
                    hook = tensor.register_hook(partial(self._claim, "gradients"))
                    stack.callback(hook.remove)
            stack.callback(register_optimizer_step_pre_hook(self._before_update).remove)
            with self:
                yield
            self._claim_holdings()

    @contextmanager
    def span(self, phase: Phase) -> Iterator[None]:
        """The trace's: the phase that the step is in."""
        outer, self._phase = self._phase, phase
        yield
        self._phase = outer
        self._claim_holdings()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            known = self._see(tensor, "other")  # it was there before
            if known is not None and isinstance(tensor, nn.Parameter) and known.category in MADE:
                self._recategorise(known, "parameters")  # gathered: what an engine holds is what it says
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor, self._category(tensor))
        if self._vocabulary is None and (func in _LOSS_OPS or (func is _PICK and args[2].shape[-1] == 1)):
            self._learn_vocabulary(args[0].shape[-1])
        return result

    def _close(self) -> None:
        for finalizer in self._finalizers.values():
            finalizer.detach()
        self._finalizers.clear()
        self._storages.clear()

    def _category(self, tensor: torch.Tensor) -> str:
        if tensor.ndim > 1 and tensor.shape[-1] == self._vocabulary:
            return "logits"
        in_autograd = torch._C._current_graph_task_id() != -1  # not in what an engine does after it
        recomputing = self._phase == "backward" and torch.is_grad_enabled() and in_autograd
        return "activations" if self._phase == "forward" or recomputing else "other"

    def _learn_vocabulary(self, width: int) -> None:
        """Logits were made before the loss could tell."""
        self._vocabulary = width
        for storage in self._storages.values():
            if storage.width == width and storage.category == "activations":
                self._recategorise(storage, "logits")

    def _before_update(self, *ignored: Any) -> None:
        self._claim_holdings()

    def _claim_holdings(self) -> None:
        claimed: set[int] = set()  # each storage by the first that names it, as in count_bytes
        for category, tensors in self._holdings().items():
            for tensor in tensors:
                key = tensor.untyped_storage()._cdata
                if key not in claimed:
                    claimed.add(key)
                    self._claim(category, tensor)

    def _claim(self, category: str, tensor: torch.Tensor) -> None:
        known = self._see(tensor, category)
        if known is not None and known.category != category:
            self._recategorise(known, category)

    def _see(self, tensor: torch.Tensor, category: str) -> _Storage | None:
        """The storage's entry; a new one in `category` where it has none."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # some layouts have none
            return None
        key = storage._cdata
        if key in self._storages:
            return self._storages[key]
        self._time += 1
        width = tensor.shape[-1] if tensor.ndim > 1 else 0
        made = _Storage(str(tensor.device), storage.nbytes(), category, width, self._time)
        self._storages[key] = made
        self._finalizers[key] = weakref.finalize(storage, self._free, key)
        self._add(made)
        return made

    def _add(self, storage: _Storage) -> None:
        place = self._places.setdefault(storage.place, _Place())
        place.live[storage.category] += storage.bytes
        if (total := place.live.total()) > place.peak_bytes:
            place.peak, place.peak_bytes, place.peak_time = place.live.copy(), total, self._time

    def _free(self, key: int) -> None:
        del self._finalizers[key]
        storage = self._storages.pop(key)
        self._places[storage.place].live[storage.category] -= storage.bytes

    def _recategorise(self, storage: _Storage, category: str) -> None:
        """From its birth on; it is alive, so it was in a peak since then."""
        place = self._places[storage.place]
        counts = [place.live, place.peak] if storage.born <= place.peak_time else [place.live]
        for count in counts:
            count[storage.category] -= storage.bytes
            count[category] += storage.bytes
        storage.category = category


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
