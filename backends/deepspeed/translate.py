"""spec -> ds_config: a pure function without torch, one small function per block, never "auto"."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtrain.contract import JSON

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

STAGES = {"none": 0, "optimizer": 1, "gradients": 2, "parameters": 3}
"""ZeRO stage by `memory.sharding`."""
NEVER = 2**31 - 1


def stage_of(spec: Spec) -> int:
    """The ZeRO stage: what the spec shards, raised to 1 for 16-bit weights.

    DeepSpeed 0.19.8 trains wrongly at stage 0 with its bf16 and fp16 blocks (the first update is
    that of Adam's second step).
    """
    sharding = "none" if spec.memory == "auto" else spec.memory.sharding
    stage = STAGES[sharding]
    return max(stage, 1) if spec.precision.weights != "fp32" else stage


def translate(spec: Spec, world: int) -> dict[str, JSON]:
    """The concrete ds_config for `world` processes."""
    return {
        **_batch(spec, world),
        "gradient_clipping": _clipping(spec),
        "zero_optimization": _zero(spec),
        **_precision(spec),
        **_optimizer(),
        **_quiet(),
    }


def _batch(spec: Spec, world: int) -> dict[str, JSON]:
    return {
        "train_batch_size": spec.batch.global_,
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulation(world),
    }


def _clipping(spec: Spec) -> float:
    """0 is none. At stage 0 the engine clips by itself: DeepSpeed does not report the norm it clips by."""
    if stage_of(spec) == 0 or spec.train.clip is None:
        return 0.0
    return spec.train.clip


def _zero(spec: Spec) -> dict[str, JSON]:
    return {
        "stage": stage_of(spec),
        "contiguous_gradients": True,
        "overlap_comm": True,
        # The default replaces torch.nn.functional.linear in the whole process, and changes autocast.
        "memory_efficient_linear": False,
    }


def _precision(spec: Spec) -> dict[str, JSON]:
    precision = spec.precision
    if precision.dtype == "fp32":
        return {}
    if precision.weights == "bf16":
        return {"bf16": {"enabled": True}}
    if precision.weights == "fp16":
        scaler: dict[str, JSON] = {
            "enabled": True,
            "auto_cast": False,
            "loss_scale": precision.loss_scale,
            "initial_scale_power": precision.initial_scale_power,
            "loss_scale_window": precision.loss_scale_window,
            "hysteresis": precision.hysteresis,
            "min_loss_scale": precision.min_loss_scale,
        }
        return {"fp16": scaler}
    # An empty list reduces gradients in fp32, as the plain autocast loop has them.
    return {"torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}}


def _optimizer() -> dict[str, JSON]:
    """The optimizer is ours (torch's): DeepSpeed's own CPU Adam agrees only to about 6e-5."""
    return {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def _quiet() -> dict[str, JSON]:
    return {"steps_per_print": NEVER, "wall_clock_breakdown": False}
