"""What `xtrain plan SPEC` answers: the peak, the ladder of techniques, ZeRO's stages, what fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xtrain.contract import JSON, MEMORY_CATEGORIES
from xtrain.errors import RequestError
from xtrain.plan.layout import HOST, Height, Layout, peaks
from xtrain.plan.model import ModelBytes
from xtrain.plan.step import Step
from xtrain.spec.tree import Manual, MemorySection, Precision, Spec

SENT = {"none": 2, "optimizer": 2, "gradients": 2, "parameters": 3}
"""Numbers sent per parameter, process and step, by memory.sharding (Rajbhandari et al. 2020, section 7)."""
STATE_ON_HOST = {"optimizer": "cpu", "gradients": "cpu"}


@dataclass(frozen=True)
class Rung:
    """One set of techniques and its peak."""

    name: str
    places: Mapping[str, Height]
    home: str
    """The place of the device that has the head."""
    fits: bool | None
    """None where no device memory was given."""

    @property
    def peak(self) -> Height:
        return self.places[self.home]


@dataclass(frozen=True)
class Subject:
    """What is planned, and how to find out about variations of it."""

    spec: Spec
    world: int
    model: Callable[[Spec], ModelBytes]
    """One micro-batch of a spec."""
    layout: Callable[[Spec], Layout]
    """RequestError where there is none."""
    device_bytes: float | None
    """What each device has, where that was said."""

    def rung(self, name: str, spec: Spec) -> Rung:
        """RequestError where `spec` cannot be laid out."""
        layout = self.layout(spec)
        found = peaks(self.step(spec), layout)
        devices = [height for place, height in found.items() if place == layout.home or place != HOST]
        limit = self.device_bytes
        fits = None if limit is None else all(height.total <= limit for height in devices)
        return Rung(name, found, layout.home, fits)

    def step(self, spec: Spec) -> Step:
        return Step(spec, self.model(spec), spec.accumulation(self.world))


@dataclass(frozen=True)
class Plan:
    model: str
    parameters: int
    accumulation: int
    own: Rung
    """Of the spec as it is."""
    rest: Mapping[str, int]
    """Of its home between steps, by category."""
    rungs: Sequence[Rung]
    stages: Sequence[Rung]
    sent_bytes: Mapping[str, int]
    """Per process and step, by stage; 0 with one process."""
    largest_micro: int | None
    """Sequences; None where no device memory was given, 0 where not even one fits."""
    notes: Sequence[str] = field(default_factory=tuple)

    def as_json(self) -> dict[str, JSON]:
        own = self.own
        return {
            "model": self.model,
            "parameters": self.parameters,
            "accumulation": self.accumulation,
            "peak_at": own.peak.name,
            "peak_bytes": whole(own.peak.bytes),
            "places": {place: whole(height.bytes) for place, height in own.places.items()},
            "rest_bytes": whole(self.rest),
            "fits": own.fits,
            "ladder": [_rung_json(rung) for rung in self.rungs],
            "sharding": [_rung_json(rung) for rung in self.stages],
            "sent_bytes": self.sent_bytes,
            "largest_micro": self.largest_micro,
            "allocator_slack_bytes": None,
            "notes": list(self.notes),
        }


def make_plan(subject: Subject, model: str, notes: Sequence[str] = ()) -> Plan:
    """Raises RequestError where the spec itself cannot be laid out."""
    spec, step = subject.spec, subject.step(subject.spec)
    weights = step.model.parameters * step.widths.weight
    several = subject.world > 1
    return Plan(
        model,
        step.model.parameters,
        step.accumulation,
        subject.rung("", spec),
        subject.layout(spec).held(step, step.rest())[subject.layout(spec).home],
        list(_possible(subject, _ladder(spec, subject.world))),
        list(_possible(subject, _stages(spec))) if several else [],
        {name: SENT[name] * weights for name in SENT} if several else dict.fromkeys(SENT, 0),
        None if subject.device_bytes is None else _largest_micro(subject),
        notes,
    )


def _possible(subject: Subject, named: Iterator[tuple[str, Spec]]) -> Iterator[Rung]:
    for name, spec in named:
        try:
            yield subject.rung(name, spec)
        except RequestError:
            continue  # not on this backend


def _ladder(spec: Spec, world: int) -> Iterator[tuple[str, Spec]]:
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


def _stages(spec: Spec) -> Iterator[tuple[str, Spec]]:
    return ((stage, with_memory(spec, sharding=stage)) for stage in SENT)


def with_micro(spec: Spec, micro: int) -> Spec:
    return spec.model_copy(update={"batch": spec.batch.model_copy(update={"micro": micro})})


def with_memory(spec: Spec, **changes: Any) -> Spec:
    """`spec` with keys of `memory` changed."""
    memory = spec.memory if isinstance(spec.memory, MemorySection) else MemorySection()
    changed = MemorySection.model_validate({**memory.model_dump(), **changes})
    return spec.model_copy(update={"memory": changed})


def _largest_micro(subject: Subject) -> int:
    """Of the micro-batches that divide a process's share of the global batch, the largest that fits."""
    share = subject.spec.batch.global_ // subject.world
    divisors = (micro for micro in range(share, 0, -1) if share % micro == 0)
    return next(
        (micro for micro in divisors if subject.rung("", with_micro(subject.spec, micro)).fits),
        0,
    )


def _rung_json(rung: Rung) -> dict[str, JSON]:
    return {
        "name": rung.name,
        "peak_at": rung.peak.name,
        "peak_bytes": whole(rung.peak.bytes),
        "total_bytes": int(rung.peak.total),
        "places": {place: int(height.total) for place, height in rung.places.items()},
        "fits": rung.fits,
    }


def whole(found: Mapping[str, int]) -> dict[str, JSON]:
    return {name: int(found.get(name, 0)) for name in MEMORY_CATEGORIES}
