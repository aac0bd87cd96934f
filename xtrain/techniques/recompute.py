"""A group of blocks that is computed again in the backward pass instead of kept (Chen et al. 2016).

The model's own loop goes on calling its blocks one by one: only `forward` of each block is replaced, so
names, hooks and whatever stands between two calls stay as they are. Autograd offers a hook for every
tensor that it would save (torch.autograd.graph.saved_tensors_hooks). In the forward pass the hook
drops the tensor and leaves an empty `Slot`. When the backward pass asks for the first slot of the
group, all blocks of the group are called once more, in order, and the hook fills the slots with what
autograd now wants to save: the same tensors, in the same order.

What is kept for this is each call's arguments. An argument that is the previous block's output, in the
same memory and unchanged, is not kept: the replay will have made it by then. So a group keeps the input
of its first block, and what its loop passes beside it (masks, rotary tables: one tensor for all).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from xtrain.techniques.surroundings import Surroundings

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Entered around a block's forward pass, and around its recomputation; see torch.utils.checkpoint."""


def keep_all() -> Contexts:
    return nullcontext(), nullcontext()


class RecomputeGroup:
    """Makes consecutive blocks of a model one scope of recomputation, in place."""

    def __init__(self, blocks: Sequence[nn.Module], contexts: Callable[[], Contexts] = keep_all) -> None:
        self.size = len(blocks)
        self.contexts = contexts
        self.open: Pass | None = None
        """The pass whose next block has not been called yet."""
        self.replayed: Pass | None = None
        for place, block in enumerate(blocks):
            block.forward = partial(self._forward, place, block, block.forward)

    def _forward(
        self, place: int, block: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Stands in for `block.forward`, which is `forward`."""
        if self.replayed is not None:
            with self.replayed.filling():
                return forward(*args, **kwargs)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if self.open is None or place <= self.open.last_place:
            self.open = Pass(self)
        current = self.open
        current.record(place, block, args, kwargs)
        with current.dropping():
            output = forward(*args, **kwargs)
        current.expect_as_input(output)
        if place == self.size - 1:
            self.open = None
        return output


class Slot:
    """Stands in the graph for one saved tensor of a pass, which it keeps alive."""

    def __init__(self, owner: Pass, tensor: torch.Tensor) -> None:
        self.owner = owner
        self.form = (tensor.shape, tensor.dtype, tensor.device)
        self.tensor: torch.Tensor | None = None


class Pass:
    """One forward pass through a group: what it takes to do it again."""

    def __init__(self, group: RecomputeGroup) -> None:
        self.group = group
        self.forward_context, self.replay_context = group.contexts()
        self.calls: list[Call] = []
        self.last_place = -1
        self.slots: list[weakref.ref[Slot]] = []  # weak: a slot dies when its node of the graph is done
        self.filled = 0
        self.outputs: dict[object, int] = {}
        """Of the last call, by `fingerprint`; and what keeps their memory from being used again."""
        self.storages: list[torch.UntypedStorage] = []

    def record(self, place: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept: list[torch.Tensor] = []

        def reference(tensor: torch.Tensor) -> FromPrevious | FromKept:
            if (output := self.outputs.get(fingerprint(tensor))) is not None:
                return FromPrevious(output)
            kept.append(tensor)
            return FromKept(len(kept) - 1)

        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        arguments = tree_map_only(torch.Tensor, reference, (args, kwargs))
        self.calls.append(Call(block, arguments, keep(kept), Surroundings.now(tensors)))
        self.last_place = place
        self.outputs, self.storages = {}, []

    def expect_as_input(self, output: object) -> None:
        """Recognise `output` in the arguments of the next call, where there is one."""
        if self.last_place < self.group.size - 1:
            tensors = tensors_of(output)
            self.outputs = {fingerprint(tensor): place for place, tensor in enumerate(tensors)}
            self.storages = [tensor.untyped_storage() for tensor in tensors]

    @contextmanager
    def dropping(self) -> Iterator[None]:
        """In the forward pass: a slot for every tensor that autograd would save."""
        with saved_tensors_hooks(self._drop, self._fetch), self.forward_context:
            yield

    @contextmanager
    def filling(self) -> Iterator[None]:
        """In the replay: every such tensor into its slot."""
        with saved_tensors_hooks(self._fill, _never), self.replay_context:
            yield

    def _drop(self, tensor: torch.Tensor) -> Slot:
        slot = Slot(self, tensor)
        self.slots.append(weakref.ref(slot))
        return slot

    def _fetch(self, slot: Slot) -> torch.Tensor:
        if slot.tensor is None:
            self.replay()
        if slot.tensor is None:
            raise RuntimeError(f"{NOT_THE_SAME}: fewer tensors than in the forward pass")
        return slot.tensor

    def _fill(self, tensor: torch.Tensor) -> None:
        if self.filled == len(self.slots):
            raise RuntimeError(f"{NOT_THE_SAME}: more tensors than in the forward pass")
        slot = self.slots[self.filled]()
        self.filled += 1
        if slot is not None:
            found = (tensor.shape, tensor.dtype, tensor.device)
            if found != slot.form:
                raise RuntimeError(f"{NOT_THE_SAME}: found {found}, expected {slot.form}")
            slot.tensor = tensor.detach()
        if self.filled == len(self.slots):
            raise Enough

    def replay(self) -> None:
        """Call the blocks again, under the same random states and autocast, until all slots are full."""
        self.filled, self.group.replayed = 0, self
        outputs: list[torch.Tensor] = []
        try:
            with torch.enable_grad():
                for call in self.calls:
                    args, kwargs = call.arguments_again(outputs)
                    with call.surroundings.restored():
                        outputs = tensors_of(call.block(*args, **kwargs))
        except Enough:
            pass  # what would come now, such as the last matrix product, nobody asks for
        finally:
            self.group.replayed = None


@dataclass(frozen=True)
class Call:
    """How one block was called."""

    block: nn.Module
    arguments: Any
    """(args, kwargs), with references in the places of tensors."""
    kept: torch.Tensor
    """Its node of the graph saved the tensors, and before torch 2.13 frees them when nobody holds this."""
    surroundings: Surroundings

    def arguments_again(self, outputs: Sequence[torch.Tensor]) -> Any:
        """(args, kwargs), given the outputs of the call before."""
        kept = self.kept.grad_fn.saved_tensors  # type: ignore[union-attr]
        with_kept = tree_map_only(FromKept, lambda one: kept[one.place], self.arguments)
        return tree_map_only(FromPrevious, lambda one: outputs[one.place], with_kept)


@dataclass(frozen=True)
class FromKept:
    place: int


@dataclass(frozen=True)
class FromPrevious:
    place: int


class Enough(BaseException):
    """Ends a replay; no `except Exception` of a model may stop it."""


NOT_THE_SAME = "a block computed something else in the backward pass than in the forward pass"


def _never(slot: None) -> torch.Tensor:
    raise RuntimeError("the graph of a recomputation has no backward pass")


class _Keep(torch.autograd.Function):
    """Saves tensors as autograd saves them: it notices when one is modified in place, and other
    hooks on saved tensors (offloading them, for one) work on these too."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)


def keep(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """An output whose node has these as `saved_tensors`. The anchor makes sure that there is one."""
    anchor = torch.empty(0, requires_grad=True)
    return _Keep.apply(anchor, *tensors)  # type: ignore[no-untyped-call, no-any-return]


def tensors_of(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def fingerprint(tensor: torch.Tensor) -> object:
    """Equal for two tensors that are the same numbers in the same memory, as long as that memory is held.

    Not the identity: hooks on modules may replace a tensor by a view of it.
    """
    storage = tensor.untyped_storage()._cdata
    form = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    return storage, form, tensor._version
