"""`memory: auto`: techniques that change nothing of what is learned, the least costly first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtrain.contract import Backend
from xtrain.errors import RequestError
from xtrain.plan.ladder import STATE_ON_HOST, with_memory, with_micro
from xtrain.plan.layout import Layout, Planned, peaks
from xtrain.plan.models import Sized, planned_model
from xtrain.plan.step import Step
from xtrain.spec.check import check_spec
from xtrain.spec.nearest import divisors
from xtrain.spec.tree import MemorySection, Spec


@dataclass(frozen=True)
class Rung:
    """A spec as it could be trained, every technique named."""

    name: str
    spec: Spec


def rungs(spec: Spec, world: int, backend: Backend, device: str | None = None) -> list[Rung]:
    """Of a spec with `memory: auto`: each with what those before it have, as far as `backend` does it.

    `device` is the place that it is planned for; without it the backend's own on this machine.
    """
    own = spec.model_copy(update={"memory": MemorySection()})
    found = [Rung("the spec as it is", own)]
    found += [Rung(f"batch.micro {micro}", with_micro(own, micro)) for micro in _parts(own)]
    for name, ways in _techniques(world):
        last = found[-1].spec
        changed = [with_memory(last, **way) for way in ways]
        possible = (one for one in changed if not _refused(one, world, backend))
        if (lower := next(possible, None)) is not None and _helps(lower, last, world, backend, device):
            found.append(Rung(name, lower))
    return found


def _parts(spec: Spec) -> Iterator[int]:
    """Smaller micro-batches: each the largest that is at most half of the one before and divides it."""
    micro = spec.micro_batch
    while micro > 1:
        micro = max(part for part in divisors(micro) if part <= micro // 2)
        yield micro


def _techniques(world: int) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """After the micro-batch: what is tried, and in which ways, the first that the backend does."""
    yield "memory.checkpointing auto", [{"checkpointing": "auto"}]
    yield "memory.checkpointing {every: 1}", [{"checkpointing": {"every": 1}}]
    if world > 1:
        yield "memory.sharding gradients", [{"sharding": "gradients"}]
        yield "memory.sharding parameters", [{"sharding": "parameters"}]
    on_host: dict[str, Any] = {"offload": STATE_ON_HOST}
    yield "memory.offload optimizer and gradients", [on_host, {**on_host, "sharding": "optimizer"}]
    yield "memory.offload activations too", [{"offload": {**STATE_ON_HOST, "activations": "cpu"}}]
    if world == 1:
        yield "memory.sharding parameters", [{"sharding": "parameters"}]


def _refused(spec: Spec, world: int, backend: Backend) -> bool:
    return bool(check_spec(spec, world, here=False) or backend.problems(spec, world))


def _helps(lower: Spec, before: Spec, world: int, backend: object, device: str | None) -> bool:
    """False where the technique moves nothing: the host has nowhere to offload to."""
    recomputed = lower.techniques.checkpointing != before.techniques.checkpointing
    if not isinstance(backend, Planned) or recomputed:
        return True
    place = device or backend.place()
    return backend.layout(lower, world, place) != backend.layout(before, world, place)


def sized(spec: Spec, backend: object) -> Sized | str:
    """What a micro-batch leaves in the model of `spec`, or why only a run could tell."""
    if not isinstance(backend, Planned):
        return f"backend {getattr(backend, 'name', '')} does not say how it lays out memory"
    try:
        model = planned_model(spec, backend.place()).bytes
        model(spec)  # where it cannot be traced, that is said here
        return model
    except RequestError as error:
        return str(error)


def predicted_bytes(spec: Spec, world: int, backend: object, model: Sized) -> int | None:
    """Of the device at its peak; None where its layout is known only once the model is there."""
    assert isinstance(backend, Planned)
    layout: Layout | None = backend.layout(spec, world, backend.place())
    if layout is None:
        return None
    return peaks(Step(spec, model(spec), spec.accumulation(world)), layout)[layout.home].total
