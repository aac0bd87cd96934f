"""Which keys of the spec the hand-written engine honours; the others it refuses by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import TYPE_CHECKING

from xtrain.contract import Problem
from xtrain.spec.tree import Offload
from xtrain.techniques.checkpointing import recomputes
from xtrain.techniques.compiled import compile_problems

from ..gpu_compiler import compiler_modules
from .drivers import driver_found

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

MAIN = "main"
DEVICE_NAME = re.compile(rf"{MAIN}|cpu|mps|cuda(:\d{{1,3}})?")


def find_problems(spec: Spec, world: int, device: str) -> list[Problem]:
    return [
        *_compile(spec, device),
        *_world(world, device),
        *_precision(spec),
        *_offload(spec),
        *_devices(spec),
    ]


def device_names(spec: Spec, main: str) -> list[str]:
    """The devices that have the model's layers, in order; `main` is the backend's own."""
    named = spec.manual.devices if spec.manual else None
    if named is None:
        named = [MAIN, "cpu"] if spec.techniques.sharding == "parameters" else [MAIN]
    return [main if name == MAIN else name for name in named]


def find_idle(spec: Spec, main: str) -> dict[str, str]:
    """Keys that are honoured by having nothing to do, with a sentence on why."""
    found = {}
    names = device_names(spec, main)
    sharding = spec.techniques.sharding
    if sharding in ("optimizer", "gradients"):
        found["memory.sharding"] = (
            f"memory.sharding: {sharding} does nothing here: one process has nothing to shard it over"
        )
    elif sharding == "parameters" and len(names) == 1:
        found["memory.sharding"] = (
            f"memory.sharding: parameters does nothing here: manual.devices names one device, {names[0]}"
        )
    if len(names) > 1 and len(set(names)) == 1:
        key = "manual.devices" if spec.manual and spec.manual.devices else "memory.sharding"
        found[key] = f"{key}: layers over devices, but all of them are {names[0]}, so no memory is saved"
    if spec.techniques.offload != Offload() and set(names) == {"cpu"}:
        found["memory.offload"] = "memory.offload does nothing here: the device is the CPU"
    whole = not recomputes(spec) and not spec.train.compile and len(names) == 1
    if spec.model.blocks is not None and whole:
        found["model.blocks"] = "model.blocks is not used: nothing in this spec works on single blocks"
    if spec.deepspeed is not None:
        found["deepspeed"] = "the deepspeed section is for another backend and is not used"
    return found


def _compile(spec: Spec, device: str) -> Iterator[Problem]:
    if spec.train.compile and device == "mps":
        expected = "expected false: torch.compile is experimental on Apple GPUs and was never tried here"
        yield Problem("train.compile", "true", expected, "use false")
    else:
        on_gpu = any(name.startswith("cuda") for name in device_names(spec, device)) and driver_found()
        yield from compile_problems(spec, compiler_modules(on_gpu))


def _world(world: int, device: str) -> Iterator[Problem]:
    if world > 1:
        nearest = f"use --nproc 1, or --backend deepspeed for {world} processes"
        yield Problem("launch.processes", str(world), f"backend {device} is always one process", nearest)


def _precision(spec: Spec) -> Iterator[Problem]:
    dtype, weights = spec.precision.dtype, spec.precision.weights
    if weights not in ("fp32", dtype):
        found = f"{{dtype: {dtype}, weights: {weights}}}"
        yield Problem("precision", found, "weights must be fp32 or of the same dtype", f"use {dtype}")


def _offload(spec: Spec) -> Iterator[Problem]:
    offload = spec.techniques.offload
    for name in ("optimizer", "gradients", "activations"):
        if getattr(offload, name).device == "nvme":
            expected = "this backend offloads to the CPU only"
            yield Problem(f"memory.offload.{name}", "nvme", expected, "use cpu, or --backend deepspeed")
    if offload.parameters.enabled:
        yield Problem(
            "memory.offload.parameters",
            offload.parameters.device,
            "this backend computes a layer where its weights are: it does not carry them to and fro",
            "leave it out: memory.sharding: parameters alone puts layers that do not fit on the CPU",
        )


def _devices(spec: Spec) -> Iterator[Problem]:
    for name in (spec.manual.devices if spec.manual else None) or []:
        if not DEVICE_NAME.fullmatch(name):
            expected = "expected main (the backend's own device), cpu, mps, cuda, or one of several: cuda:1"
            close = get_close_matches(name, (MAIN, "cpu", "mps", "cuda"), n=1, cutoff=0.7)  # gpu is not cpu
            yield Problem("manual.devices", name, expected, f"use {close[0] if close else MAIN}")
