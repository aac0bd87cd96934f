"""One training step on one device, walked through on paper: what is alive at each of its heights.

A step has four: the loss at the end of the forward pass, every group of blocks in the backward pass, the
embedding at its end, and the update. Which of them is the peak depends on the model and the techniques, so
all are computed, by category, and the highest is the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xtrain.models.loss_chunk import chunk_tokens
from xtrain.models.presets import Dimensions, parameter_count
from xtrain.plan.gpt2 import FP32, Kept, Widths, block_parameters
from xtrain.spec.tree import AdamW, Checkpointing, MemorySection, Spec
from xtrain.techniques.checkpointing import groups

Categories = Counter[str]
"""Bytes by contract.MEMORY_CATEGORIES."""


@dataclass(frozen=True)
class Height:
    """One moment at which memory may be fullest."""

    name: str
    bytes: Categories

    @property
    def total(self) -> int:
        return self.bytes.total()


@dataclass(frozen=True)
class Scope:
    """Consecutive blocks whose backward passes follow one another: a recomputed group, or one kept block."""

    blocks: int
    kept: int
    """Bytes from the forward pass until their backward."""
    recomputed: int
    """Bytes that the backward pass makes again."""


class Step:
    """The step of a built-in model, whole on one device."""

    def __init__(self, spec: Spec, size: Dimensions, accumulation: int) -> None:
        self.size = size
        self.widths = Widths.of(spec.precision)
        self.kept = Kept(size, spec.micro_batch * spec.data.seq_len, self.widths)
        self.section = spec.memory if isinstance(spec.memory, MemorySection) else MemorySection()
        self.accumulation = accumulation
        self.adam = isinstance(spec.optimizer, AdamW)
        self.momentum = not isinstance(spec.optimizer, AdamW) and spec.optimizer.momentum > 0
        self.parameters = parameter_count(size)

    @property
    def peak(self) -> Height:
        return max(self.heights(), key=lambda height: height.total)

    def at_rest(self) -> Categories:
        """Between steps, once the first update was made."""
        moments = 2 if self.adam else int(self.momentum)
        master = 0 if self.widths.weight == FP32 else FP32 * self.parameters
        return Counter(
            parameters=self.widths.weight * self.parameters,
            master=master,
            optimizer=FP32 * moments * self.parameters,
        )

    def heights(self) -> Iterator[Height]:
        rest = self.at_rest()
        before = self.parameters * self.widths.weight if self.accumulation > 1 else 0
        yield Height("loss", rest + self._loss(before))
        if self.chunk is None:
            yield Height("backward of the loss", rest + self._plain_loss_backward(before))
        yield from (Height("backward", rest + moment) for moment in self._backward(before))
        yield Height("embedding", rest + self._embedding(before))
        yield Height("update", rest + self._update())

    @property
    def chunk(self) -> int | None:
        return chunk_tokens(self.section.loss_chunk, self.size.vocab_size)

    @property
    def projection(self) -> int:
        """Numbers in the tied embedding."""
        return self.size.vocab_size * self.size.hidden

    def scopes(self) -> Sequence[Scope]:
        """In the order of the forward pass."""
        chosen, kept = self.section.checkpointing, self.kept
        if chosen.selective is not None and chosen.selective.ops:
            again = kept.block - kept.block_without_cheap
            return [Scope(1, kept.block_without_cheap, again)] * self.size.layers
        recomputed = groups(chosen, self.size.layers) if chosen != Checkpointing() else []
        inside = {place for group in recomputed for place in group}
        whole = [Scope(len(g), kept.stream, len(g) * kept.block - kept.stream) for g in recomputed]
        return whole + [Scope(1, kept.block, 0)] * (self.size.layers - len(inside))

    def _forward_kept(self) -> int:
        return sum(scope.kept for scope in self.scopes()) + self.kept.head

    def _loss(self, gradients: int) -> Categories:
        kept = self.kept
        activations = self._forward_kept() + self._copies_of_the_pass()
        if self.chunk is None:
            activations += kept.tokens * self.size.hidden * self.widths.compute  # the normed stream
        else:  # and its gradient, and that of the tied matrix
            activations += 2 * kept.stream + self.projection * FP32
            activations += kept.tokens * self.size.hidden * 2 if self.widths.autocast else 0
        return Counter(
            gradients=gradients,
            activations=activations,
            logits=kept.logits(self.chunk),
            other=kept.ids,
        )

    def _copies_of_the_pass(self) -> int:
        """16-bit copies that autocast holds to the end of the pass: the head's, and of recomputed blocks."""
        if not self.widths.autocast:
            return 0
        recomputed = sum(scope.blocks for scope in self.scopes() if scope.recomputed)
        return 2 * self.projection + recomputed * self.kept.weight_copies

    def _plain_loss_backward(self, gradients: int) -> Categories:
        """Log-probabilities, the gradient of each, and that of each logit."""
        logits = 3 * self.kept.tokens * self.size.vocab_size * FP32
        before = self._loss(gradients)
        return Counter({**before, "logits": logits})

    def _backward(self, before: int) -> Iterator[Categories]:
        scopes, one = self.scopes(), block_parameters(self.size) * self.widths.weight
        done, left = 0, sum(scope.kept for scope in scopes)
        for scope in reversed(scopes):
            gradients = max(before, self.projection * self.widths.weight + done * one)
            yield Counter(
                gradients=gradients,
                activations=left + scope.recomputed,
                other=2 * self.kept.stream + self.kept.expanded + self.kept.ids,
            )
            done, left = done + scope.blocks, left - scope.kept

    def _embedding(self, before: int) -> Categories:
        """The tied matrix has two dense gradients, the head's and the stem's; autograd makes their sum."""
        tied = self.projection * self.widths.weight
        return Counter(
            gradients=self.parameters * self.widths.weight + (tied if before else 0),
            activations=tied,  # the head's, made in the forward pass
            other=tied + self.kept.stream + self.kept.ids,
        )

    def _update(self) -> Categories:
        """16-bit gradients are widened one by one, the tied matrix first, and each released at once."""
        wide, narrow = self.parameters * FP32, self.parameters * self.widths.weight
        if self.widths.weight == FP32:
            return Counter(gradients=wide)
        return Counter(gradients=max(wide, narrow + self.projection * FP32))
