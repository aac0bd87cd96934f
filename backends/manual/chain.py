"""Whether the blocks of a model are a chain: without that, they cannot be on several devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from xtrain.errors import RequestError

PROBE_TOKENS = 8


def check_chain(model: nn.Module, blocks: Sequence[nn.Module], seq_len: int) -> None:
    """Run a few tokens through a model on the CPU and look at how it calls its blocks.

    Raises RequestError unless it calls each once, in order, and with what the one before has returned.
    """
    calls = Calls()
    with calls.watched(blocks), torch.no_grad():
        try_sequence(model, min(PROBE_TOKENS, seq_len))
    if fault := calls.fault(len(blocks)):
        raise RequestError(
            f"layers over devices: the blocks of this model do not chain: {fault}; expected each to be "
            "called once, in order, with what the one before has returned; use manual.devices: [main], or "
            "name the right list in model.blocks"
        )


def try_sequence(model: nn.Module, tokens: int) -> torch.Tensor:
    """The loss of one sequence, as if in training, on copies of the model's buffers: those stay."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    sequence = torch.zeros(1, tokens, dtype=torch.int64)
    loss: torch.Tensor = torch.func.functional_call(model, buffers, (sequence, sequence))
    return loss


class Calls:
    """The calls of blocks in one pass."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self.unlinked: list[int] = []
        """Places of blocks that were called with something else than the last output."""
        self.output: list[Any] = []

    @contextmanager
    def watched(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        hooks = []
        for place, block in enumerate(blocks):
            hooks.append(block.register_forward_pre_hook(partial(self._enter, place), with_kwargs=True))
            hooks.append(block.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def fault(self, blocks: int) -> str:
        """What is wrong, for people; empty when it is a chain."""
        if self.places != list(range(blocks)):
            return f"a pass calls blocks {self.places}, of {blocks}"
        if self.unlinked:
            return f"block {self.unlinked[0]} is called with something else"
        return ""

    def _enter(self, place: int, block: nn.Module, args: Any, kwargs: Any) -> None:
        given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
        if self.places and not any(id(leaf) in given for leaf in self.output):
            self.unlinked.append(place)
        self.places.append(place)

    def _leave(self, block: nn.Module, args: Any, output: Any) -> None:
        self.output = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
