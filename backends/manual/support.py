"""Which keys of the spec the hand-written engine honours; the others it refuses by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xtrain.contract import Problem

if TYPE_CHECKING:
    from xtrain.spec.tree import MemorySection, Spec

NOT_BUILT = "not built on this backend yet"


def find_problems(spec: Spec, world: int, device: str) -> list[Problem]:
    return [*_world(world, device), *_model(spec), *_training(spec), *_precision(spec), *_memory(spec)]


def find_notes(spec: Spec) -> list[str]:
    """What is honoured by having nothing to do."""
    if spec.memory == "auto" or spec.memory.sharding not in ("optimizer", "gradients"):
        return []
    return [f"memory.sharding: {spec.memory.sharding}: with one process there is nothing to shard it over"]


def _world(world: int, device: str) -> Iterator[Problem]:
    if world > 1:
        yield Problem(
            "launch.processes",
            str(world),
            f"backend {device} is always one process",
            f"use --nproc 1, or --backend deepspeed for {world} processes",
        )


def _model(spec: Spec) -> Iterator[Problem]:
    if spec.model.hf is not None:
        yield Problem("model.hf", spec.model.hf, NOT_BUILT, "use model.preset or model.factory")
    if spec.model.init_from is not None:
        yield Problem("model.init_from", spec.model.init_from, NOT_BUILT, "leave it out")
    if spec.model.blocks is not None:
        yield Problem("model.blocks", spec.model.blocks, NOT_BUILT, "leave it out")


def _training(spec: Spec) -> Iterator[Problem]:
    if spec.train.compile:
        yield Problem("train.compile", "true", NOT_BUILT, "set it to false")
    if spec.manual is not None:
        yield Problem("manual", "", f"layers over devices are {NOT_BUILT}", "leave the section out")


def _precision(spec: Spec) -> Iterator[Problem]:
    dtype, weights = spec.precision.dtype, spec.precision.weights
    if weights not in ("fp32", dtype):
        found = f"{{dtype: {dtype}, weights: {weights}}}"
        yield Problem("precision", found, "weights must be fp32 or of the same dtype", f"use {dtype}")


def _memory(spec: Spec) -> Iterator[Problem]:
    if spec.memory == "auto":
        yield Problem("memory", "auto", NOT_BUILT, "leave the section out")
        return
    memory: MemorySection = spec.memory
    if memory.checkpointing.enabled:
        yield Problem("memory.checkpointing", "", NOT_BUILT, "use none")
    if memory.sharding == "parameters":
        yield Problem("memory.sharding", memory.sharding, NOT_BUILT, "use none")
    for name in ("optimizer", "gradients", "parameters", "activations"):
        if getattr(memory.offload, name).enabled:
            found = getattr(memory.offload, name).device
            yield Problem(f"memory.offload.{name}", found, NOT_BUILT, "use none")
