"""For the planner: what one rank of DeepSpeed 0.19.8 keeps, read off its code and measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtrain.plan.layout import HOST, Categories
from xtrain.plan.model import FP32
from xtrain.plan.places import hold_pass
from xtrain.plan.step import Moment, Step

from .zero import BLOCK, bucket_numbers, stage_of

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

SCATTERED_COPIES = 2
"""Of what leaves the bucket, while stage 3 scatters it."""


@dataclass(frozen=True)
class Partitioned:
    """Implements xtrain.plan.layout.Layout: one process of `world`, at a ZeRO stage.

    The optimizer works on an fp32 copy of a rank's share from stage 1 on, also where weights are fp32.
    Gradients pass through flat buckets.
    """

    home: str
    stage: int
    world: int
    state_on_host: bool
    activations_on_host: bool
    given_bucket: int | None
    """Numbers in it as an override has them."""

    def held(self, step: Step, moment: Moment) -> Mapping[str, Categories]:
        held: defaultdict[str, Categories] = defaultdict(Counter)
        self._state(held, step)
        held[self.home]["other"] += self._buckets(step, moment)
        if moment.phase == "update":
            self._update(held, step)
        elif moment.phase == "pass":
            self._gradients(held[self.home], step, moment)
            hold_pass(held, step, moment, lambda block: self.home, self.activations_on_host)
            if self.stage == 3:
                self._gathered(held[self.home], step, moment)
        return held

    def sent_bytes(self, step: Step) -> int:
        """By rings: of n numbers each process passes on (world - 1) / world of n, twice in an all-reduce."""
        numbers = self._sent_numbers(step) * (self.world - 1) // self.world
        return numbers * step.widths.weight

    def _sent_numbers(self, step: Step) -> int:
        """Gradients are reduced in every micro-batch from stage 2 on, below at the last one alone.

        DeepSpeed 0.19.8 all-reduces them at stages 1 and 2 too (use_multi_rank_bucket_allreduce), and gathers
        the updated weights once.
        """
        numbers, passes = step.model.parameters, step.accumulation
        if self.stage == 3:
            return passes * numbers + self._gathered_numbers(step)
        reductions = passes if self.stage == 2 else 1
        return 2 * numbers * reductions + (numbers if self.stage else 0)

    def _gathered_numbers(self, step: Step) -> int:
        """At stage 3, in a step.

        Blocks for each pass, but for the last, which stays, and what is prefetched over the turn; those of a
        recomputed group once more, but for two at its turn. The head's matrix stays from forward to backward;
        the stem's is gathered for each. Measured: within 1% without groups, 12% with them on a small model.
        """
        model, passes = step.model, step.accumulation
        again = sum(max(len(scope.kept) - 2, 0) for scope in step.scopes())
        blocks = max(2 * model.layers - 2, model.layers) + again
        others = model.outside_parameters - model.projection * (1 if model.tied else 2)
        return passes * (blocks * model.block_parameters + 3 * model.projection + 2 * others)

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
        """Whole where they wait for the last micro-batch to be reduced, else a share.

        Stage 2 sums the shares of a micro-batch by themselves, and adds them to those before at its end.
        """
        numbers, width, accumulated = step.model.parameters, step.widths.weight, step.accumulation > 1
        if self.stage == 0 or (self.stage == 1 and accumulated):
            held["gradients"] += width * (numbers if accumulated else _made(step, moment))
        elif self.stage < 3:
            held["gradients"] += width * self._share(numbers if accumulated else 0)
            held["gradients"] += width * self._share(self._reduced(step, moment))
        # stage 3's own are claimed by its bucket
        held["gradients" if self.stage < 3 else "other"] += width * moment.fresh

    def _update(self, held: dict[str, Categories], step: Step) -> None:
        """Stage 0 flattens all gradients for the all-reduce; the others flatten a share, and widen it."""
        numbers, width = step.model.parameters, step.widths.weight
        home, share = held[self.home], self._share(numbers)
        if self.stage == 0:
            home["gradients"] += width * numbers
            home["other"] += width * numbers
            return
        if self.stage < 3:
            home["gradients"] += width * share
        held[self._updated]["gradients"] += FP32 * share
        if width != FP32:
            home["other"] += width * share

    def _buckets(self, step: Step, moment: Moment) -> int:
        """Stage 3 keeps one for ever; stages 1 and 2 make two for a backward pass, until it is reduced."""
        in_backward = moment.phase == "pass" and (moment.at is not None or moment.made_blocks > 0)
        unreduced = self.stage == 1 and step.accumulation > 1 and moment.phase == "pass"
        count = 1 if self.stage == 3 else 2 if self.stage and (in_backward or unreduced) else 0
        return count * self.bucket(step) * step.widths.weight

    def bucket(self, step: Step) -> int:
        """Numbers that gradients are collected in before they are reduced."""
        return self.given_bucket or bucket_numbers(step.model.block_parameters)

    def _full_bucket(self, step: Step) -> int:
        """Numbers in a bucket when the next gradient has no room in it: whole blocks, by and large."""
        bucket = self.bucket(step)
        return max(bucket - bucket % step.model.block_parameters, 1)

    def _reduced(self, step: Step, moment: Moment) -> int:
        """Numbers of gradients of this pass that have left the buckets."""
        if moment.made_blocks == step.model.layers:
            return step.model.parameters
        full = self._full_bucket(step)
        return _made(step, moment) // full * full

    def _gathered(self, held: Categories, step: Step, moment: Moment) -> None:
        """Weights that are whole for a moment: a block, one ahead, and what its last prefetch took beyond.

        Gradients that leave the bucket are copied in the order of their owners, and again by the collective.
        """
        model, width, full = step.model, step.widths.weight, self._full_bucket(step)
        if moment.made_blocks == model.layers:  # at the end: tables, and what is left in the bucket
            live, scattered = model.outside_parameters, model.parameters % full
        elif moment.at is not None:
            live = 2 * (model.block_parameters + model.widest)
            scattered = full if _made(step, moment) + model.block_parameters > full else 0
        else:
            live, scattered = 2 * model.block_parameters + model.widest + model.projection, 0
        if self.world > 1:  # one process has them anyway
            held["parameters"] += width * min(model.parameters, live)
        held["other"] += SCATTERED_COPIES * width * scattered


def _made(step: Step, moment: Moment) -> int:
    """Numbers of gradients that this pass has made."""
    return moment.made_blocks * step.model.block_parameters + moment.made_outside


def layout_of(spec: Spec, world: int, device: str) -> Partitioned | None:
    """None where parameters leave the device, or anything is on a drive."""
    offload = spec.techniques.offload
    if offload.parameters.enabled or offload.optimizer.device == "nvme":
        return None
    state, activations = (one.enabled and device != HOST for one in (offload.optimizer, offload.activations))
    return Partitioned(device, stage_of(spec), world, state, activations, _given_bucket(spec))


def _given_bucket(spec: Spec) -> int | None:
    override = (spec.deepspeed or {}).get(BLOCK)
    given = override.get("reduce_bucket_size") if isinstance(override, dict) else None
    # 5e8 too, as DeepSpeed's documentation writes it
    return int(given) if isinstance(given, int | float) else None
