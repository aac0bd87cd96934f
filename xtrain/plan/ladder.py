"""Variations of a spec, one technique after the other, and the peak of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtrain.errors import RequestError
from xtrain.plan.layout import HOST, Height, Layout, peaks
from xtrain.plan.models import Sized
from xtrain.plan.step import Step
from xtrain.spec.check_memory import update_problems
from xtrain.spec.nearest import divisors
from xtrain.spec.tree import STAGES, Manual, MemorySection, Precision, Spec

STATE_ON_HOST = {"optimizer": "cpu", "gradients": "cpu"}
USABLE = 0.9
"""Share of what a device has that a plan may fill: the rest is slack, workspace and the runtime."""


@dataclass(frozen=True)
class Rung:
    """One set of techniques and its peak."""

    name: str
    places: Mapping[str, Height]
    home: str
    """The place of the device that has the head."""
    fits: bool | None
    """Into USABLE of every device; None where no device memory was given."""
    sent_bytes: int
    """By each process, in one step."""

    @property
    def peak(self) -> Height:
        return self.places[self.home]


@dataclass(frozen=True)
class Subject:
    """What is planned, and how to find out about variations of it."""

    spec: Spec
    world: int
    model: Sized
    """Its bytes for one micro-batch."""
    layout: Callable[[Spec], Layout]
    """RequestError where there is none."""
    device_bytes: float | None
    """What each device has, where that was said."""

    def rung(self, name: str, spec: Spec) -> Rung:
        """RequestError where `spec` cannot be laid out."""
        layout = self.layout(spec)
        step = self.step(spec)
        found = peaks(step, layout)
        devices = [height for place, height in found.items() if place == layout.home or place != HOST]
        limit = None if self.device_bytes is None else USABLE * self.device_bytes
        fits = None if limit is None else all(height.total <= limit for height in devices)
        return Rung(name, found, layout.home, fits, layout.sent_bytes(step))

    def step(self, spec: Spec) -> Step:
        return Step(spec, self.model(spec), spec.accumulation(self.world))


def possible(subject: Subject, named: Iterable[tuple[str, Spec]]) -> Iterator[Rung]:
    """Those that the backend can lay out."""
    for name, spec in named:
        try:
            yield subject.rung(name, spec)
        except RequestError:
            continue  # not on this backend


def ladder(spec: Spec, world: int) -> Iterator[tuple[str, Spec]]:
    """The documents' order, each rung with those before it."""
    whole_batch = max(1, spec.batch.global_ // world)
    changed = {"precision": Precision(), "memory": MemorySection(), "manual": None}
    plain = with_micro(spec.model_copy(update=changed), whole_batch)
    yield "plain fp32, the whole batch at once", plain
    mixed = plain.model_copy(update={"precision": Precision.model_validate("bf16")})
    yield "+ bf16 autocast", mixed
    small = with_micro(mixed, 1)
    yield "+ accumulation, micro-batch 1", small
    checkpointed = with_memory(small, checkpointing="auto")
    yield "+ activation checkpointing", checkpointed
    halves = checkpointed.model_copy(update={"precision": Precision(dtype="bf16", weights="bf16")})
    yield "+ bf16 weights with fp32 masters", halves
    if world > 1:
        sharded = with_memory(halves, sharding="parameters")
        yield f"+ sharding: parameters over {world} processes", sharded
        yield "+ optimizer and gradients on the host", with_memory(sharded, offload=STATE_ON_HOST)
        return
    offloaded = with_memory(halves, offload=STATE_ON_HOST)
    yield "+ optimizer and gradients on the host", offloaded
    halved = Manual(devices=["main", "cpu"], split=[0.5, 0.5])
    yield "+ half of the layers on the host", offloaded.model_copy(update={"manual": halved})


def stages(spec: Spec) -> Iterator[tuple[str, Spec]]:
    return ((stage, with_memory(spec, sharding=stage)) for stage in STAGES)


def with_micro(spec: Spec, micro: int) -> Spec:
    return spec.model_copy(update={"batch": spec.batch.model_copy(update={"micro": micro})})


def with_memory(spec: Spec, **changes: Any) -> Spec:
    """`spec` with keys of `memory` changed."""
    changed = MemorySection.model_validate({**spec.techniques.model_dump(), **changes})
    return spec.model_copy(update={"memory": changed})


def largest_micro(subject: Subject) -> int:
    """Of the micro-batches that divide a process's share of the global batch, the largest that fits."""
    share = subject.spec.batch.global_ // subject.world
    falling = (with_micro(subject.spec, micro) for micro in reversed(divisors(share)))
    allowed = (spec for spec in falling if not any(update_problems(spec)))
    return next((spec.micro_batch for spec in allowed if subject.rung("", spec).fits), 0)
