"""What an override does under a spec: often nothing, because DeepSpeed reads many keys only at some ZeRO
stages or with an offload.

Which and when was found in DeepSpeed 0.19.8's sources (runtime/engine.py, runtime/zero, runtime/swap_tensor).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from xtrain.spec.keys import covering
from xtrain.spec.nearest import divisors, either, neighbours
from xtrain.spec.tree import AdamW

from .zero import BLOCK, stage_of

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec


@dataclass(frozen=True)
class Condition:
    """What of a spec makes DeepSpeed read a key."""

    met: Callable[[Spec], bool]
    only: str
    """As it ends the sentence "DeepSpeed reads it only ..."."""
    remedy: str


def _on_drive(spec: Spec) -> set[str]:
    offload = spec.techniques.offload
    return {name for name in ("optimizer", "parameters") if getattr(offload, name).device == "nvme"}


SHARDED = Condition(lambda spec: stage_of(spec) > 0, "from ZeRO stage 1 on", "set memory.sharding")
EARLY = Condition(
    lambda spec: stage_of(spec) in (1, 2),
    "at ZeRO stages 1 and 2",
    "set memory.sharding: gradients",
)
LATE = Condition(lambda spec: stage_of(spec) == 3, "at ZeRO stage 3", "set memory.sharding: parameters")
OPTIMIZER_AWAY = Condition(
    lambda spec: spec.techniques.offload.optimizer.enabled,
    "with an offloaded optimizer",
    "set memory.offload.optimizer",
)
OPTIMIZER_SWAPPED = Condition(
    lambda spec: "optimizer" in _on_drive(spec),
    "with the optimizer on a drive",
    "set memory.offload.optimizer: {device: nvme, path: ...}",
)
PARAMETERS_AWAY = Condition(
    lambda spec: spec.techniques.offload.parameters.enabled,
    "with offloaded parameters",
    "set memory.offload.parameters",
)
PARAMETERS_SWAPPED = Condition(
    lambda spec: "parameters" in _on_drive(spec),
    "with the parameters on a drive",
    "set memory.offload.parameters: {device: nvme, path: ...}",
)
SWAPPED = Condition(
    lambda spec: bool(_on_drive(spec)),
    "with something on a drive",
    "set memory.offload.optimizer: {device: nvme, path: ...}",
)

LOUD = Condition(
    lambda spec: (spec.deepspeed or {}).get("log_level") in ("debug", "info"),
    "with log_level: info, as its messages are off otherwise",
    "set deepspeed.log_level",
)

READ_WHEN: dict[str, Condition] = {
    **dict.fromkeys(("comms_logger", "dump_state", "steps_per_print"), LOUD),
    **{
        f"{BLOCK}.offload_optimizer.{key}": OPTIMIZER_SWAPPED
        for key in ("buffer_count", "fast_init", "pipeline_read", "pipeline_write")
    },
    f"{BLOCK}.offload_optimizer": OPTIMIZER_AWAY,
    **{
        f"{BLOCK}.offload_param.{key}": PARAMETERS_SWAPPED
        for key in ("buffer_count", "buffer_size", "max_in_cpu")
    },
    f"{BLOCK}.offload_param": PARAMETERS_AWAY,
    "aio": SWAPPED,
    **{
        f"{BLOCK}.{key}": EARLY
        for key in (
            "allgather_bucket_size",
            "ignore_unused_parameters",
            "parameter_alignment",
            "round_robin_gradients",
            "use_multi_rank_bucket_allreduce",
        )
    },
    **{
        f"{BLOCK}.{key}": LATE
        for key in (
            "enable_sanity_checks",
            "leaf_module",
            "log_trace_cache_warnings",
            "override_module_apply",
            "stage3_allgather_sequential",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_model_persistence_threshold",
            "stage3_module_granularity_threshold",
            "stage3_param_persistence_threshold",
            "stage3_prefetch_bucket_size",
            "stage3_use_all_reduce_for_fetch_params",
            "sub_group_size",
            "zero_hpz_partition_size",
        )
    },
    BLOCK: SHARDED,
}
"""The first entry that covers a key tells when DeepSpeed reads it; keys without one are read always."""


def unmet(key: str, spec: Spec) -> Condition | None:
    """What `spec` lacks for `key` to have an effect; None where it has one, or nobody knows yet."""
    if spec.memory == "auto":
        return None
    entry = covering(key, READ_WHEN)
    condition = READ_WHEN[entry] if entry is not None else None
    return condition if condition is not None and not condition.met(spec) else None


def unfit(key: str, value: Any, spec: Spec, world: int) -> tuple[str, str] | None:
    """What was expected of a value that DeepSpeed takes and this spec makes no sense of, and advice."""
    match key:
        case "communication_data_type":
            return _communication(value, spec)
        case "zero_optimization.zero_hpz_partition_size" if world % value:
            near = either(neighbours(value, divisors(world)))
            return f"expected a divisor of the number of processes ({world})", f"nearest: {near}"
        case "zero_optimization.offload_optimizer.buffer_count" if value < _swapped_together(spec):
            needed = _swapped_together(spec)
            expected = f"expected at least {needed}: parameter, gradient and what the optimizer keeps"
            return expected, f"use {needed}"
    return None


def _communication(value: str, spec: Spec) -> tuple[str, str] | None:
    weights = spec.precision.weights
    if value in ("fp32", weights):
        return None
    kept = "fp32" if weights == "fp32" else f"{weights} or fp32"
    expected = f"expected {kept}: the gradients of {weights} weights would be rounded on their way"
    return expected, "leave it out, or change precision"


def _swapped_together(spec: Spec) -> int:
    """Tensors of one parameter that an update needs in memory at once."""
    if isinstance(spec.optimizer, AdamW):
        return 4
    return 3 if spec.optimizer.momentum else 2
