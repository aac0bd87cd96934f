"""Which keys of the spec this backend honours; the others it refuses by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from xtrain.contract import Problem
from xtrain.spec.check import batch_problems
from xtrain.spec.keys import printed
from xtrain.spec.tree import Offload
from xtrain.techniques.checkpointing import recomputes
from xtrain.techniques.compiled import compile_notes, compile_problems

from ..gpu_compiler import compiler_modules
from .apple import mac_notes, mac_problems, macos_version, on_mac
from .environment import sees_gpu
from .fp16 import fp16_problems
from .nvme import nvme_problems
from .overrides import override_notes, override_problems
from .translate import declared_settings
from .zero import is_raised, stage_of

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec


def find_problems(spec: Spec, world: int) -> list[Problem]:
    """What of `spec` cannot be honoured with `world` processes on this machine."""
    here = (
        mac_problems(spec, world, macos_version())
        if on_mac()
        else (*nvme_problems(spec), *fp16_problems(spec))
    )
    return [*find_spec_problems(spec, world), *here]


def find_spec_problems(spec: Spec, world: int) -> list[Problem]:
    """What of `spec` cannot be honoured with `world` processes, whatever the machine."""
    return [
        *_compile(spec),
        *batch_problems(spec, world),
        *_precision(spec),
        *_offload(spec),
        *_update(spec),
        *override_problems(spec, world, declared_settings(spec, world)),
    ]


def find_notes(spec: Spec) -> list[str]:
    """Decisions that are not the spec's own words."""
    notes = compile_notes(spec)
    if is_raised(spec):
        notes.append(
            "ZeRO stage 1 instead of 0: "
            f"DeepSpeed trains wrongly at stage 0 with {spec.precision.weights} weights"
        )
    if stage_of(spec) == 0:
        notes.append(
            "gradients are clipped by xtrain: at stage 0 DeepSpeed does not tell the norm it clips by"
        )
    if on_mac():
        notes += mac_notes(spec)
    offload = spec.techniques.offload
    if offload.optimizer.enabled and not offload.gradients.enabled:
        notes.append("gradients are offloaded too: DeepSpeed keeps them with the optimizer")
    return notes


def find_idle(spec: Spec, world: int) -> dict[str, str]:
    """Keys that are honoured by having nothing to do, with a sentence on why."""
    found = {}
    asked = spec.techniques
    if world == 1 and asked.sharding != "none" and asked.offload == Offload():
        found["memory.sharding"] = (
            "memory.sharding saves nothing here: one process has nothing to shard it over"
        )
    if asked.offload.activations.enabled and not sees_gpu():
        found["memory.offload.activations"] = (
            "memory.offload.activations does nothing here: the device is the CPU"
        )
    works_on_blocks = recomputes(spec) or spec.train.compile or stage_of(spec) > 0
    if spec.model.blocks is not None and not works_on_blocks:
        found["model.blocks"] = "model.blocks is not used: nothing in this spec works on single blocks"
    if spec.manual is not None:
        found["manual"] = "the manual section is for another backend and is not used"
    return found | override_notes(spec)


def _compile(spec: Spec) -> Iterator[Problem]:
    if spec.train.compile and on_mac():
        yield Problem("train.compile", "true", "expected false: it was never tried on a Mac", "use false")
    elif spec.train.compile and stage_of(spec) == 3:
        expected = "expected false: at stage 3 DeepSpeed fetches weights by hooks inside the blocks"
        yield Problem("train.compile", "true", expected, "use memory.sharding: gradients, or compile: false")
    else:
        yield from compile_problems(spec, compiler_modules(sees_gpu()))


def _update(spec: Spec) -> Iterator[Problem]:
    if spec.techniques.optimizer_in_backward:
        expected = "expected false: DeepSpeed updates once all gradients are reduced"
        nearest = "use memory.sharding: gradients, or --backend cuda or cpu with one process"
        yield Problem("memory.optimizer_in_backward", "true", expected, nearest)


def _precision(spec: Spec) -> Iterator[Problem]:
    dtype, weights = spec.precision.dtype, spec.precision.weights
    found = f"{{dtype: {dtype}, weights: {weights}}}"
    if (dtype, weights) == ("fp16", "fp32"):
        expected = "DeepSpeed's fp16 autocast has a loss scaler of its own, with rules that no key reaches"
        yield Problem("precision", found, expected, "use fp16 (16-bit weights) or bf16")
    elif weights not in ("fp32", dtype):
        yield Problem("precision", found, "weights must be fp32 or of the same dtype", f"use {dtype}")
    floor = spec.precision.min_loss_scale
    if not floor.is_integer():
        expected = "expected a whole number: DeepSpeed takes no other"
        yield Problem("precision.min_loss_scale", printed(floor), expected, f"use {max(1, round(floor))}")


def _offload(spec: Spec) -> Iterator[Problem]:
    """What DeepSpeed cannot move off the device, or not at this stage."""
    offload, stage = spec.techniques.offload, stage_of(spec)
    if offload.optimizer.enabled and stage == 0:
        expected = "expected sharding: DeepSpeed offloads from ZeRO stage 1 on, also with one process"
        found = str(offload.optimizer.device)
        yield Problem("memory.offload.optimizer", found, expected, "set memory.sharding: optimizer")
    if offload.gradients.enabled and offload.gradients != offload.optimizer:
        found = f"{offload.gradients.device} with optimizer {offload.optimizer.device}"
        expected = "DeepSpeed keeps offloaded gradients where it updates: with the optimizer"
        yield Problem("memory.offload.gradients", found, expected, "set memory.offload.optimizer to the same")
    if offload.activations.device == "nvme":
        expected = "what autograd keeps goes to the CPU only: it is needed again within the step"
        yield Problem("memory.offload.activations", "nvme", expected, "use cpu, or memory.checkpointing")
    for key in ("optimizer", "parameters"):
        if getattr(offload, key).device != "nvme":
            continue
        path = f"memory.offload.{key}"
        if stage != 3:
            expected = "DeepSpeed swaps to a drive at stage 3 only"
            yield Problem(path, "nvme", expected, "set memory.sharding: parameters, or use cpu")
        elif key == "parameters" and spec.model.preset is None:
            expected = "expected a preset: how large the swap buffers must be follows from its sizes"
            yield Problem(path, "nvme", expected, "use cpu")
