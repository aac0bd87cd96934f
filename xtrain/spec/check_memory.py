"""Problems across the keys of `memory` and `manual`: techniques that contradict each other or the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from xtrain.contract import Problem
from xtrain.models.presets import dimensions
from xtrain.spec.keys import printed
from xtrain.spec.tree import Checkpointing, Offload, Spec

SHARES_TOLERANCE = 1e-3


def memory_problems(spec: Spec) -> Iterator[Problem]:
    """What the techniques of `memory` ask of each other; `memory: auto` asks nothing."""
    asked = spec.techniques
    yield from _checkpointing(asked.checkpointing)
    yield from _drives(asked.offload)
    if asked.offload.parameters.enabled and asked.sharding != "parameters":
        found = f"{asked.offload.parameters.device} with sharding {asked.sharding}"
        expected = "expected memory.sharding parameters: whole parameters cannot leave the device"
        yield Problem("memory.offload.parameters", found, expected, "set memory.sharding: parameters")


def _checkpointing(chosen: Checkpointing) -> Iterator[Problem]:
    path = "memory.checkpointing"
    given = [key for key in ("auto", "every", "number", "selective") if getattr(chosen, key)]
    if len(given) > 1:
        expected = "expected one of auto, every, number, selective"
        yield Problem(path, " and ".join(given), expected, f"keep {given[0]}")
    selective = chosen.selective
    if selective is not None and (selective.ratio is None) == (selective.ops is None):
        found = "ratio and ops" if selective.ops else "neither"
        nearest = "keep ops: cheap" if selective.ops else "add ratio: 0.5, or ops: cheap"
        yield Problem(f"{path}.selective", found, "expected exactly one of ratio, ops", nearest)


def group_problems(spec: Spec) -> Iterator[Problem]:
    """Groups of recomputed blocks against the layers of a preset."""
    if spec.model.preset is None:
        return
    layers, chosen = dimensions(spec).layers, spec.techniques.checkpointing
    for key, value in (("every", chosen.every), ("number", chosen.number)):
        if value is not None and value > layers:
            expected = f"expected at most the {layers} layers of the model"
            yield Problem(f"memory.checkpointing.{key}", str(value), expected, f"nearest: {layers}")


def loss_problems(spec: Spec) -> Iterator[Problem]:
    chunk = spec.techniques.loss_chunk
    if spec.model.factory is not None and isinstance(chunk, int):
        expected = "expected only with model.preset or model.hf: this model makes its logits as a whole"
        yield Problem("memory.loss_chunk", str(chunk), expected, "leave it out")


def update_problems(spec: Spec) -> Iterator[Problem]:
    """What `memory.optimizer_in_backward` cannot be together with: what comes between backward and update."""
    if not spec.techniques.optimizer_in_backward:
        return
    for expected, nearest in _before_an_update(spec, spec.techniques.offload):
        yield Problem("memory.optimizer_in_backward", "true", expected, nearest)


def _before_an_update(spec: Spec, offload: Offload) -> Iterator[tuple[str, str]]:
    """(what was expected, the nearest thing that works)"""
    if spec.train.clip is not None:
        expected = f"expected train.clip null, not {spec.train.clip:g}: clipping asks for the norm of all"
        yield f"{expected} gradients before the first update", "set train.clip: null"
    share = spec.batch.global_ // spec.launch.processes
    if spec.micro_batch < share:
        expected = (
            f"expected one pass per update, not {share // spec.micro_batch}: no gradient is final before"
        )
        yield f"{expected} the last", f"set batch.micro: {share}"
    if spec.stability is not None:
        expected = (
            "expected no stability section: its guards are asked before an update, here it is made by then"
        )
        yield expected, "leave stability out"
    if spec.precision.dtype == "fp16":
        expected = "expected no fp16: whether gradients overflowed is known after the update was made"
        yield expected, "use precision: bf16"
    if offload.gradients.enabled:
        expected = "expected memory.offload.gradients none: no gradient waits for the update"
        yield expected, "leave memory.offload.gradients out"


def _drives(offload: Offload) -> Iterator[Problem]:
    for name in Offload.model_fields:
        target = getattr(offload, name)
        path = f"memory.offload.{name}"
        if target.device == "nvme" and not target.path:
            expected = "expected a folder on the drive: nvme needs one"
            yield Problem(f"{path}.path", "", expected, "add path, or use device: cpu")
        elif target.device != "nvme" and target.path is not None:
            expected = f"expected only with device nvme, not {target.device}"
            yield Problem(f"{path}.path", target.path, expected, "use device: nvme, or leave path out")


def placement_problems(spec: Spec) -> Iterator[Problem]:
    """`manual.devices` and `manual.split` against each other and the layers of a preset."""
    if spec.manual is None:
        return
    devices, split = spec.manual.devices, spec.manual.split
    if devices is not None and not devices:
        yield Problem("manual.devices", "[]", "expected at least one device", "leave it out, or use [main]")
    elif devices is not None and spec.model.preset is not None and len(devices) > dimensions(spec).layers:
        layers = dimensions(spec).layers
        expected = f"expected at most one device for each of the {layers} layers"
        nearest = f"use {layers} devices, or model.layers {len(devices)}"
        yield Problem("manual.devices", f"{len(devices)} devices", expected, nearest)
    elif split != "auto":
        yield from _split(spec, devices, split)


def _split(spec: Spec, devices: list[str] | None, split: list[int] | list[float]) -> Iterator[Problem]:
    path = "manual.split"
    if devices is None:
        nearest = f"name {len(split)} devices there, or use split: auto"
        yield Problem(path, printed(split), "expected only with manual.devices", nearest)
    elif len(split) != len(devices):
        expected = f"expected {len(devices)} entries, one for each of manual.devices"
        yield Problem(path, f"{len(split)} entries", expected, "add or remove some, or use split: auto")
    elif any(isinstance(part, float) for part in split):
        yield from _fractions(split)
    elif spec.model.preset is not None:
        yield from _counts(split, dimensions(spec).layers)


def _fractions(shares: Sequence[float]) -> Iterator[Problem]:
    total = math.fsum(shares)
    if abs(total - 1) <= SHARES_TOLERANCE:
        return
    found = f"{printed(list(shares))}, which sum to {total:g}"
    scaled = (
        [round(share / total, 4) for share in shares] if total else [round(1 / len(shares), 4)] * len(shares)
    )
    yield Problem("manual.split", found, "expected shares that sum to 1", f"nearest: {scaled}")


def _counts(counts: Sequence[float], layers: int) -> Iterator[Problem]:
    total = int(sum(counts))
    if total == layers:
        return
    found = f"{printed(list(counts))}, which sum to {total}"
    expected = f"expected counts that sum to the {layers} layers of the model"
    yield Problem("manual.split", found, expected, f"nearest: {_rescaled(counts, layers)}")


def _rescaled(counts: Sequence[float], layers: int) -> list[int]:
    """Whole counts in about the same proportion that sum to `layers`, at least 1 each."""
    ends = [round(sum(counts[: place + 1]) / sum(counts) * layers) for place in range(len(counts))]
    taken: list[int] = []
    for place, end in enumerate(ends):
        left_over = len(counts) - place - 1  # each of the entries behind needs one layer
        taken.append(min(max(1, end - sum(taken)), layers - sum(taken) - left_over))
    return taken
