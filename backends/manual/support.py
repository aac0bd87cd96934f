"""Which keys of the spec the hand-written engine honours; the others it refuses by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xtrain.contract import Problem
from xtrain.spec.keys import refusals

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

REFUSED = {
    "model.blocks": "leave it out",
    "train.compile": "use false",
    "memory.checkpointing": "use none",
    "memory.offload": "use none",
    "manual": "leave the section out",
}
"""Keys whose technique comes later, with what to do until then."""


def find_problems(spec: Spec, world: int, device: str) -> list[Problem]:
    return [*refusals(spec, REFUSED), *_world(world, device), *_precision(spec), *_memory(spec)]


def find_notes(spec: Spec) -> list[str]:
    """What is honoured by having nothing to do."""
    notes = []
    if spec.memory != "auto" and spec.memory.sharding in ("optimizer", "gradients"):
        notes.append(
            f"memory.sharding: {spec.memory.sharding} does nothing here: "
            "one process has nothing to shard it over"
        )
    if spec.deepspeed is not None:
        notes.append("the deepspeed section is for another backend and is not used")
    return notes


def _world(world: int, device: str) -> Iterator[Problem]:
    if world > 1:
        nearest = f"use --nproc 1, or --backend deepspeed for {world} processes"
        yield Problem("launch.processes", str(world), f"backend {device} is always one process", nearest)


def _precision(spec: Spec) -> Iterator[Problem]:
    dtype, weights = spec.precision.dtype, spec.precision.weights
    if weights not in ("fp32", dtype):
        found = f"{{dtype: {dtype}, weights: {weights}}}"
        yield Problem("precision", found, "weights must be fp32 or of the same dtype", f"use {dtype}")


def _memory(spec: Spec) -> Iterator[Problem]:
    if spec.memory == "auto":
        yield Problem("memory", "auto", "not built on this backend yet", "leave the section out")
    elif spec.memory.sharding == "parameters":
        yield Problem("memory.sharding", "parameters", "not built on this backend yet", "use none")
