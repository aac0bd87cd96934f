"""One training step, walked through on paper: what its passes hold at each moment that may be the fullest.

A step has five: the loss at the end of the forward pass, its own backward pass, every group of blocks after
it, the embedding at the end, and the update. Which of them is the peak depends on the model and the
techniques, so all are computed. Where an engine keeps what, and how much of it in each process, is its
layout's to say (layout.py): it turns a moment into bytes by place and category.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from xtrain.models.loss_chunk import chunk_tokens
from xtrain.models.presets import Dimensions, dimensions
from xtrain.plan import gpt2
from xtrain.plan.model import FP32, ModelBytes
from xtrain.spec.tree import AdamW, Checkpointing, Spec
from xtrain.techniques.checkpointing import groups


@dataclass(frozen=True)
class Moment:
    """What a pass holds beside the training state. Bytes, where it does not say numbers or blocks."""

    name: str
    kept: Sequence[int] = ()
    """Activations until their backward, by block."""
    again: Sequence[int] = ()
    """Activations that the backward pass has made again, by block."""
    head: int = 0
    """Activations that the head keeps."""
    running: int = 0
    """Activations that head and loss are at work on."""
    logits: int = 0
    other: int = 0
    """Batches, gradients of activations, temporaries."""
    at: int | None = None
    """The block that the backward pass is in: `other` is beside it."""
    asked: int = 0
    """How many of that block's largest activations the next gradient is made of."""
    gone: int = 0
    """Activations of that block that were let go."""
    made_blocks: int = 0
    """Blocks, from the last one, whose gradients this pass has made."""
    made_outside: int = 0
    """Numbers of gradients made outside the blocks, without what is fresh."""
    fresh: int = 0
    """Numbers of a gradient that is made, and not yet added to that of the passes before."""
    final: bool = True
    """Whether nothing else of this pass is to be added to what is fresh."""
    phase: Literal["pass", "update", "rest"] = "pass"


class Step:
    """The step of one model in one process, once the optimizer has its state."""

    def __init__(self, spec: Spec, model: ModelBytes, accumulation: int) -> None:
        self.model = model
        self.widths = model.widths
        self.section = spec.techniques
        self.accumulation = accumulation
        adam = isinstance(spec.optimizer, AdamW)
        momentum = not isinstance(spec.optimizer, AdamW) and spec.optimizer.momentum > 0
        self.moment_bytes = FP32 * (2 if adam else int(momentum))
        """Of the optimizer, per number."""
        chunk = "none" if model.whole_logits else self.section.loss_chunk
        self.chunk = chunk_tokens(chunk, model.vocab_size)

    @staticmethod
    def rest() -> Moment:
        """Between steps: no pass, no gradients."""
        return Moment("rest", phase="rest")

    def moments(self) -> Iterator[Moment]:
        loss = self._loss()
        yield loss
        if self.chunk is None:
            yield self._plain_loss_backward(loss)
        yield from self._backward()
        yield from self._embeddings()
        yield Moment("update", phase="update")

    def scopes(self) -> Sequence[Scope]:
        """In the order of the forward pass."""
        chosen, model = self.section.checkpointing, self.model
        if chosen.selective is not None and chosen.selective.ops:
            again = model.block - model.block_without_cheap + model.products_beside
            return [Scope((model.block_without_cheap,), (again,))] * model.layers
        recomputed = groups(chosen, model.layers) if chosen != Checkpointing() else []
        inside = {place for group in recomputed for place in group}
        whole = [self._recomputed(len(group)) for group in recomputed]
        return whole + [Scope((model.block,), (0,))] * (model.layers - len(inside))

    def _recomputed(self, blocks: int) -> Scope:
        """A group keeps the input of its first block."""
        first, others = self.model.block - self.model.stream, [self.model.block] * (blocks - 1)
        return Scope((self.model.stream, *[0] * (blocks - 1)), (first, *others))

    def _loss(self) -> Moment:
        model = self.model
        fresh = 0
        if self.chunk is None:
            running = model.tokens * model.hidden * self.widths.compute  # the normed stream
        else:  # and its gradient, and that of the head's matrix
            running = 2 * model.stream
            running += model.tokens * model.hidden * 2 if self.widths.autocast else 0
            if model.tied or self.widths.weight != FP32:  # one more is made of it
                running += model.projection * FP32
            else:
                fresh = model.projection
        kept = tuple(chain.from_iterable(scope.kept for scope in self.scopes()))
        logits, beside = model.logits(self.chunk)
        return Moment(
            "loss",
            kept=kept,
            head=model.head,
            running=running + beside + self._copies_of_the_pass(),
            logits=logits,
            other=model.ids,
            fresh=fresh,
        )

    def _copies_of_the_pass(self) -> int:
        """16-bit copies that autocast holds to the end of the pass: the head's, and of recomputed blocks."""
        if not self.widths.autocast:
            return 0
        recomputed = sum(len(scope.kept) for scope in self.scopes() if any(scope.again))
        return 2 * self.model.projection + recomputed * self.model.weight_copies

    def _plain_loss_backward(self, loss: Moment) -> Moment:
        """Log-probabilities, the gradient of each, and that of each logit."""
        logits = 3 * self.model.tokens * self.model.vocab_size * FP32
        return replace(loss, name="backward of the loss", logits=logits)

    def _backward(self) -> Iterator[Moment]:
        model, scopes = self.model, self.scopes()
        left = [scope.kept for scope in scopes]
        done = 0
        for scope in reversed(scopes):
            last = model.layers - done - 1
            before = (0,) * (model.layers - done - len(scope.again))
            product = Moment(
                "backward",
                kept=tuple(chain.from_iterable(left)),
                again=before + scope.again,
                running=self._waiting,
                other=model.expanded + model.stream * (2 if self.widths.autocast else 1) + model.ids,
                at=last,
                asked=1,
                made_blocks=done,
                made_outside=0 if model.tied else model.projection,
                fresh=0 if self.widths.autocast else model.widest,
            )
            yield product
            yield self._function(product)
            done += len(left.pop())

    def _function(self, product: Moment) -> Moment:
        """Of what the second product took, a gate's or a function's result: its gradient, and those behind.

        The result itself is gone, as is the weight's gradient.
        """
        model = self.model
        copy = 2 * model.widest if self.widths.autocast else 0
        factors = 2 if model.gated else 1
        return replace(
            product,
            asked=factors,
            gone=model.expanded + copy,
            other=(1 + factors) * model.expanded + model.stream + model.ids,
            fresh=0,
        )

    @property
    def _waiting(self) -> int:
        """A tied matrix's gradient from the head waits for that of the stem: autograd adds the two."""
        return self.model.projection * self.widths.weight if self.model.tied else 0

    def _embeddings(self) -> Iterator[Moment]:
        """A table's gradient is as large as itself: the tokens', and what else there is (positions)."""
        model = self.model
        tokens = Moment(
            "embedding",
            running=self._waiting,
            other=(model.projection * self.widths.weight if model.tied else 0) + model.stream + model.ids,
            made_blocks=model.layers,
            made_outside=model.outside_parameters - model.projection,
            fresh=model.projection,
            final=not model.tied,
        )
        yield tokens
        rest = model.stream + model.ids
        yield replace(tokens, running=0, other=rest, final=True)
        tables = model.projection * (1 if model.tied else 2)
        others = max(0, model.outside_parameters - tables)
        outside = model.outside_parameters - others
        yield replace(tokens, other=rest, made_outside=outside, fresh=others, final=True)


@dataclass(frozen=True)
class Scope:
    """Consecutive blocks whose backward passes follow one another: a recomputed group, or one kept block.

    Bytes by block.
    """

    kept: tuple[int, ...]
    """From the forward pass until their backward."""
    again: tuple[int, ...]
    """Made again by the backward pass."""


def preset_step(spec: Spec, accumulation: int, size: Dimensions | None = None, on_host: bool = True) -> Step:
    """The step of a built-in model; `size` where the data decides about the vocabulary."""
    return Step(spec, gpt2.spec_bytes(spec, size or dimensions(spec), on_host), accumulation)
