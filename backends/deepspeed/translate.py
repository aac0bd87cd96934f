"""spec -> ds_config: a pure function without torch, one small function per block, never "auto".

Every value is a Setting that knows the spec keys it follows from; mapping.py, the documentation and
`xtrain translate --origins` are made from that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from xtrain.contract import JSON
from xtrain.exchange.translation import Setting, nested
from xtrain.models.presets import dimensions

from .overrides import merge
from .zero import stage_of, zero_settings

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

NEVER = 2**31 - 1


def translate(spec: Spec, world: int) -> dict[str, JSON]:
    """The concrete ds_config for `world` processes, as `xtrain run` gives it to DeepSpeed."""
    return nested(engine_settings(spec, world))


def engine_settings(spec: Spec, world: int) -> list[Setting]:
    """Every key of that ds_config with its origin; `deepspeed:` overrides come last."""
    own = [*shared_settings(spec, world, _engine_clipping(spec)), *_own_optimizer()]
    return merge(own, spec)


def declared_settings(spec: Spec, world: int) -> list[Setting]:
    """What the spec says in DeepSpeed's words, for overrides to be held against."""
    return list(shared_settings(spec, world, clipping(spec)))


def shared_settings(spec: Spec, world: int, clip: Setting) -> Iterator[Setting]:
    """What is the same with and without xtrain around it; who clips differs."""
    yield from _batch(spec, world)
    yield clip
    yield from _precision(spec)
    yield from _communication(spec)
    yield from zero_settings(spec, world)
    yield from _activation_checkpointing(spec)
    yield from _quiet()


def _batch(spec: Spec, world: int) -> Iterator[Setting]:
    yield Setting("train_batch_size", spec.batch.global_, ("batch.global",))
    rule = "" if spec.batch.micro is not None else "batch.global, where it is not given"
    yield Setting("train_micro_batch_size_per_gpu", spec.micro_batch, ("batch.micro",), rule)
    passes = f"batch.global / (micro x {world} process{'es' * (world > 1)})"
    keys = ("batch.global", "batch.micro", "launch.processes")
    if spec.batch.global_ % (spec.micro_batch * world) == 0:  # refused elsewhere
        yield Setting("gradient_accumulation_steps", spec.accumulation(world), keys, passes)


def clipping(spec: Spec) -> Setting:
    rule = "0 for none" if spec.train.clip is None else ""
    return Setting("gradient_clipping", spec.train.clip or 0.0, ("train.clip",), rule)


def _engine_clipping(spec: Spec) -> Setting:
    """At stage 0 the engine clips by itself: DeepSpeed does not report the norm it clips by."""
    if stage_of(spec) > 0:
        return clipping(spec)
    return Setting("gradient_clipping", 0.0, ("train.clip",), "0 at stage 0: xtrain clips and knows the norm")


def _precision(spec: Spec) -> Iterator[Setting]:
    precision = spec.precision
    keys = ("precision.dtype", "precision.weights")
    if precision.weights == "bf16":
        yield Setting("bf16.enabled", True, keys, "16-bit weights, fp32 masters")
    elif precision.weights == "fp16":
        yield Setting("fp16.enabled", True, keys, "16-bit weights, fp32 masters")
        yield Setting(
            "fp16.auto_cast", False, (), "fixed: inputs are token numbers, there is nothing to cast"
        )
        for key in ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis"):
            yield Setting(f"fp16.{key}", getattr(precision, key), (f"precision.{key}",))
        floor = int(precision.min_loss_scale)  # another is refused: DeepSpeed takes whole numbers only
        yield Setting("fp16.min_loss_scale", floor, ("precision.min_loss_scale",))
    elif precision.dtype != "fp32":
        yield Setting("torch_autocast.enabled", True, keys, "autocast over fp32 weights")
        dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision.dtype]
        yield Setting("torch_autocast.dtype", dtype, ("precision.dtype",), "torch's name")
        reason = "fixed: with an empty list gradients are reduced in fp32, as without DeepSpeed"
        yield Setting("torch_autocast.lower_precision_safe_modules", [], (), reason)


def _communication(spec: Spec) -> Iterator[Setting]:
    reason = "of the weights: gradients are reduced in the format they have"
    yield Setting("communication_data_type", spec.precision.weights, ("precision.weights",), reason)


def _activation_checkpointing(spec: Spec) -> Iterator[Setting]:
    """The block of deepspeed.checkpointing, where the spec says something that it has a word for.

    For models that call it: under xtrain none does, and recomputing and offloading are xtrain's own.
    """
    groups, on_cpu = _groups(spec), spec.techniques.offload.activations.device == "cpu"
    if groups is None and not on_cpu:
        return
    block, off = "activation_checkpointing", "off unless deepspeed.activation_checkpointing says otherwise"
    cpu = ("memory.offload.activations",)
    yield Setting(f"{block}.partition_activations", on_cpu, cpu, "with cpu: it fails alone")
    yield Setting(f"{block}.cpu_checkpointing", on_cpu, cpu, "true for cpu")
    yield Setting(f"{block}.contiguous_memory_optimization", False, (), off)
    if groups is not None:
        keys = ("memory.checkpointing.number", "memory.checkpointing.every")
        yield Setting(f"{block}.number_checkpoints", groups, keys, "groups of recomputed layers")
    yield Setting(f"{block}.synchronize_checkpoint_boundary", False, (), off)
    yield Setting(f"{block}.profile", False, (), off)


def _groups(spec: Spec) -> int | None:
    """How many groups of layers are recomputed, where that can be known without building the model."""
    every, number = spec.techniques.checkpointing.every, spec.techniques.checkpointing.number
    if every is not None and spec.model.preset is not None:
        return math.ceil(dimensions(spec).layers / every)
    return number


def _own_optimizer() -> Iterator[Setting]:
    """The optimizer is ours (torch's): DeepSpeed's own CPU Adam agrees only to about 6e-5."""
    reason = "fixed: xtrain passes torch's optimizer, which is not on DeepSpeed's list"
    yield Setting("zero_allow_untested_optimizer", True, (), reason)
    reason = "fixed: torch's optimizer stays; DeepSpeed's CPU Adam agrees with it only to about 6e-5"
    yield Setting("zero_force_ds_cpu_optimizer", False, (), reason)


def _quiet() -> Iterator[Setting]:
    yield Setting("steps_per_print", NEVER, (), "fixed: xtrain prints")
    yield Setting("wall_clock_breakdown", False, (), "fixed: its timers synchronise at every step")
