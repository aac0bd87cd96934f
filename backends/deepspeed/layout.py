"""For the planner: what one rank of DeepSpeed 0.19.8 keeps, read off its code and measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtrain.plan.layout import HOST, Categories
from xtrain.plan.model import FP32
from xtrain.plan.step import Moment, Step

from .zero import SMALLEST_BUCKET, offload_of, stage_of

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

SCATTERED_COPIES, SCATTERED_AUTOCAST = 3, 2
"""Of a full bucket, while stage 3 scatters it."""


@dataclass(frozen=True)
class Partitioned:
    """Implements xtrain.plan.layout.Layout: one process of `world`, at a ZeRO stage.

    The optimizer works on an fp32 copy of a rank's share from stage 1 on, also where weights are fp32.
    Gradients pass through flat buckets: two at stages 1 and 2, for the overlap, one at stage 3.
    """

    home: str
    stage: int
    world: int
    state_on_host: bool

    def held(self, step: Step, moment: Moment) -> Mapping[str, Categories]:
        held: defaultdict[str, Categories] = defaultdict(Counter)
        self._state(held, step)
        if moment.phase == "update":
            self._update(held, step)
        elif moment.phase == "pass":
            self._gradients(held[self.home], step, moment)
            self._pass(held[self.home], moment)
            held[self.home]["other"] += self._buckets(step)
            if self.stage == 3:
                self._gathered(held[self.home], step, moment)
        return held

    @property
    def _updated(self) -> str:
        return HOST if self.state_on_host else self.home

    def _share(self, numbers: int) -> int:
        """Of one rank, where it is divided."""
        return -(-numbers // self.world)

    def _state(self, held: dict[str, Categories], step: Step) -> None:
        numbers, width = step.model.parameters, step.widths.weight
        weights = self._share(numbers) if self.stage == 3 else numbers
        trained = self._share(numbers) if self.stage else numbers
        held[self.home]["parameters"] += width * weights
        held[self._updated]["optimizer"] += step.moment_bytes * trained
        if self.stage:
            held[self._updated]["master"] += FP32 * trained
        if self.stage == 3:  # made once, never let go
            held[self._updated]["gradients"] += width * trained

    def _gradients(self, held: Categories, step: Step, moment: Moment) -> None:
        """Whole below stage 2, where they are reduced at the end; a share from there on."""
        numbers, width = step.model.parameters, step.widths.weight
        made = moment.made_blocks * step.model.block_parameters + moment.made_outside
        if self.stage < 2:
            held["gradients"] += width * (numbers if step.accumulation > 1 else made)
        elif self.stage == 2:
            held["gradients"] += width * self._share(numbers if step.accumulation > 1 else made)
        if step.accumulation > 1 or moment.at is not None:
            held["gradients"] += width * moment.fresh

    def _update(self, held: dict[str, Categories], step: Step) -> None:
        """Stage 0 flattens all gradients for the all-reduce; the others widen a rank's share."""
        numbers, width = step.model.parameters, step.widths.weight
        home = held[self.home]
        if self.stage == 0:
            home["gradients"] += width * numbers
            home["other"] += width * numbers
        elif self.stage < 3:
            home["gradients"] += width * (numbers if self.stage == 1 else self._share(numbers))
            home["other"] += self._buckets(step) + width * self._share(numbers)
        else:
            held[self._updated]["gradients"] += FP32 * self._share(numbers)

    def _pass(self, held: Categories, moment: Moment) -> None:
        held["activations"] += sum(moment.kept) + sum(moment.again) + moment.head + moment.running
        held["logits"] += moment.logits
        held["other"] += moment.other

    def _bucket_numbers(self, step: Step) -> int:
        return max(step.model.block_parameters, SMALLEST_BUCKET)

    def _buckets(self, step: Step) -> int:
        count = {0: 0, 1: 2, 2: 2, 3: 1}[self.stage]
        return count * self._bucket_numbers(step) * step.widths.weight

    def _gathered(self, held: Categories, step: Step, moment: Moment) -> None:
        """Weights that are whole for a moment (stage3_max_live_parameters), and a bucket on its way."""
        model, width = step.model, step.widths.weight
        table = max(model.projection, model.outside_parameters - model.projection)
        live = min(model.parameters, 2 * model.block_parameters + table)
        held["parameters"] += width * live
        made = moment.made_blocks * model.block_parameters + moment.made_outside
        copies = SCATTERED_AUTOCAST if step.widths.autocast else SCATTERED_COPIES
        held["other"] += copies * width * min(made, self._bucket_numbers(step))


def layout_of(spec: Spec, world: int, device: str) -> Partitioned | None:
    """None where parameters leave the device, or anything is on a drive."""
    offload = offload_of(spec)
    if offload.parameters.enabled or offload.optimizer.device == "nvme":
        return None
    return Partitioned(device, stage_of(spec), world, offload.optimizer.enabled and device != HOST)
