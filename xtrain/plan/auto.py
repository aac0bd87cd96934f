"""`memory: auto`: techniques that change nothing of what is learned, the least costly first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtrain.contract import Backend
from xtrain.models.presets import dimensions
from xtrain.plan import gpt2
from xtrain.plan.ladder import STATE_ON_HOST, with_memory, with_micro
from xtrain.plan.layout import DEVICE, HOST, Layout, Planned, peaks
from xtrain.plan.model import Widths
from xtrain.plan.step import Step
from xtrain.spec.check import check_spec
from xtrain.spec.tree import MemorySection, Spec


@dataclass(frozen=True)
class Rung:
    """A spec as it could be trained, every technique named."""

    name: str
    spec: Spec


def rungs(spec: Spec, world: int, backend: Backend) -> list[Rung]:
    """Of a spec with `memory: auto`: each with what those before it have, as far as `backend` does it."""
    own = spec.model_copy(update={"memory": MemorySection()})
    found = [Rung("the spec as it is", own)]
    found += [Rung(f"batch.micro {micro}", with_micro(own, micro)) for micro in _parts(own)]
    for name, ways in _techniques(world):
        last = found[-1].spec
        changed = [with_memory(last, **way) for way in ways]
        possible = (one for one in changed if not _refused(one, world, backend))
        if (lower := next(possible, None)) is not None and _helps(lower, last, world, backend):
            found.append(Rung(name, lower))
    return found


def _parts(spec: Spec) -> Iterator[int]:
    """Smaller micro-batches: each the largest that is at most half of the one before and divides it."""
    micro = spec.micro_batch
    while micro > 1:
        micro = next(part for part in range(micro // 2, 0, -1) if micro % part == 0)
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


def _helps(lower: Spec, before: Spec, world: int, backend: object) -> bool:
    """False where the technique moves nothing: the host has nowhere to offload to."""
    assert isinstance(lower.memory, MemorySection)
    assert isinstance(before.memory, MemorySection)
    if not isinstance(backend, Planned) or lower.memory.checkpointing != before.memory.checkpointing:
        return True
    place = device_name(backend)
    return backend.layout(lower, world, place) != backend.layout(before, world, place)


def device_name(backend: Planned) -> str:
    """What the planner calls its device: a backend with the name of the host's memory computes there."""
    return HOST if backend.name == HOST else DEVICE


def predicted_bytes(spec: Spec, world: int, backend: object) -> int | None:
    """Of the device at its peak; None where only the model itself could tell."""
    if spec.model.preset is None or spec.model.dropout > 0 or not isinstance(backend, Planned):
        return None
    layout: Layout | None = backend.layout(spec, world, device_name(backend))
    if layout is None:
        return None
    tokens = spec.micro_batch * spec.data.seq_len
    model = gpt2.model_bytes(dimensions(spec), tokens, Widths.of(spec.precision))
    return peaks(Step(spec, model, spec.accumulation(world)), layout)[layout.home].total
