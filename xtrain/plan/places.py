"""One process: on one device, with its layers over several, or with parts of its state on the host."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xtrain.plan.layout import DEVICE, HOST, Categories
from xtrain.plan.model import FP32
from xtrain.plan.step import Moment, Step
from xtrain.spec.tree import Offload


@dataclass(frozen=True)
class Places:
    """Implements layout.Layout. Stem, head and loss are at home."""

    home: str = DEVICE
    blocks: Sequence[str] = ()
    """The place of each; empty where all are at home."""
    offload: Offload = field(default_factory=Offload)
    updates_in_backward: bool = False
    """Whether each gradient goes as soon as it is final."""

    def held(self, step: Step, moment: Moment) -> Mapping[str, Categories]:
        held: defaultdict[str, Categories] = defaultdict(Counter)
        for place, numbers in self._numbers(step):
            self._state(held, step, place, numbers)
        if moment.phase == "update":
            if not self.updates_in_backward:
                self._update(held, step)
        elif moment.phase == "pass":
            if self.updates_in_backward:
                self._gradient(held, step, moment)
            else:
                self._gradients(held, step, moment)
            hold_pass(held, step, moment, self._place, self.offload.activations.enabled)
        return held

    def sent_bytes(self, step: Step) -> int:
        return 0

    def _place(self, block: int | None) -> str:
        """None: of stem, head and loss."""
        return self.home if block is None or not self.blocks else self.blocks[block]

    def _updated(self, place: str) -> str:
        """Where the optimizer works on a weight that is at `place`."""
        return HOST if self.offload.optimizer.enabled else place

    def _numbers(self, step: Step) -> Iterator[tuple[str, int]]:
        """Of the parameters outside the blocks, and of each block."""
        yield self.home, step.model.outside_parameters
        for block in range(step.model.layers):
            yield self._place(block), step.model.block_parameters

    def _state(self, held: dict[str, Categories], step: Step, place: str, numbers: int) -> None:
        """Weights, the optimizer's state, and a master copy where weights are narrow or elsewhere."""
        held[place]["parameters"] += step.widths.weight * numbers
        updated = self._updated(place)
        if step.widths.weight != FP32 or updated != place:
            held[updated]["master"] += FP32 * numbers
        held[updated]["optimizer"] += step.moment_bytes * numbers

    def _update(self, held: dict[str, Categories], step: Step) -> None:
        """Narrow gradients are widened one by one, the head's matrix first, and each released at once."""
        for place, numbers in self._numbers(step):
            held[self._updated(place)]["gradients"] += FP32 * numbers
        narrow, wide = step.model.parameters * step.widths.weight, step.model.parameters * FP32
        if step.widths.weight != FP32:
            above = narrow + step.model.projection * FP32 - wide
            held[self._updated(self.home)]["gradients"] += max(0, above)

    def _gradients(self, held: dict[str, Categories], step: Step, moment: Moment) -> None:
        width, accumulated = step.widths.weight, step.accumulation > 1
        outside, *blocks = self._numbers(step)
        numbers_outside = outside[1] if accumulated else moment.made_outside
        held[self._gathered(self.home)]["gradients"] += width * numbers_outside
        for place, numbers in blocks if accumulated else blocks[len(blocks) - moment.made_blocks :]:
            held[self._gathered(place)]["gradients"] += width * numbers
        held[self._place(moment.at)]["gradients"] += width * moment.fresh

    def _gradient(self, held: dict[str, Categories], step: Step, moment: Moment) -> None:
        """The one that is being made and used, and its fp32 copy where the optimizer has a master copy."""
        place = self._place(moment.at)
        updated = self._updated(place)
        held[place]["gradients"] += step.widths.weight * moment.fresh
        if moment.final and (step.widths.weight != FP32 or updated != place):
            held[updated]["gradients"] += FP32 * moment.fresh

    def _gathered(self, place: str) -> str:
        """Where the gradient of a weight at `place` waits for the update."""
        return HOST if self.offload.gradients.enabled else place


def hold_pass(
    held: dict[str, Categories],
    step: Step,
    moment: Moment,
    place_of: Callable[[int | None], str],
    parked: bool,
) -> None:
    """What forward and backward hold: `parked` activations on the host, all else where their block is.

    `place_of` a block, or of stem, head and loss for None.
    """
    model, home, at = step.model, place_of(None), place_of(moment.at)
    for block, kept in enumerate(moment.kept):
        copied = kept + model.views if kept == model.block else kept
        held[HOST if parked else place_of(block)]["activations"] += copied if parked else kept
    for block, again in enumerate(moment.again):
        held[place_of(block)]["activations"] += again
    held[HOST if parked else home]["activations"] += moment.head
    held[HOST if parked else at]["activations"] -= moment.gone
    held[home]["activations"] += moment.running
    held[home]["logits"] += moment.logits
    held[at]["other"] += moment.other
    if parked:  # what is asked for comes back where the gradient is made
        held[at]["other"] += moment.asked * model.expanded
