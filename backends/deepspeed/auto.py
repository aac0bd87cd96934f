"""What stands for "auto" in a ds_config, as with Hugging Face: TrainingArguments, or their defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

ARGUMENTS: dict[str, tuple[str, Any]] = {
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", 8),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
    "gradient_clipping": ("max_grad_norm", 1.0),
    "fp16.enabled": ("fp16", False),
    "bf16.enabled": ("bf16", False),
    "optimizer.params.lr": ("learning_rate", 5e-5),
    "optimizer.params.eps": ("adam_epsilon", 1e-8),
    "optimizer.params.weight_decay": ("weight_decay", 0.0),
    "scheduler.params.warmup_max_lr": ("learning_rate", 5e-5),
    "scheduler.params.warmup_num_steps": ("warmup_steps", 0),
    "scheduler.params.total_num_steps": ("max_steps", -1),
}
"""ds_config key -> the argument that fills it, with that argument's default."""
SPEC_KEYS = {
    "train_batch_size": "batch.global",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.global",
    "gradient_clipping": "train.clip",
    "fp16.enabled": "precision",
    "bf16.enabled": "precision",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "scheduler.params.warmup_min_lr": "schedule",
    "scheduler.params.warmup_max_lr": "optimizer.lr",
    "scheduler.params.warmup_num_steps": "schedule.warmup",
    "scheduler.params.total_num_steps": "train.steps",
}


def resolve_auto(
    flat: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The values without any "auto", and by spec key what each one became and from where.

    An "auto" that nothing fills is left out: xtrain derives that value from the model by itself.
    """
    resolved: dict[str, Any] = {}
    chosen: dict[str, str] = {}
    for key, value in flat.items():
        if isinstance(value, Mapping) and key.endswith(".params"):
            inside = {f"{key}.{name}": one for name, one in value.items()}
            below, said = resolve_auto(inside, arguments)
            resolved[key] = {name.removeprefix(f"{key}."): one for name, one in below.items()}
            chosen |= said
        elif value != "auto":
            resolved[key] = value
        else:
            found, source = _fill(key, arguments)
            if found is not None:
                resolved[key] = found
            chosen[SPEC_KEYS.get(key, f"deepspeed.{key}")] = source
    return resolved, chosen


def _fill(key: str, arguments: Mapping[str, Any]) -> tuple[Any, str]:
    """The value for an "auto" at `key`, None where there is none, and a sentence about it."""
    if key == "optimizer.params.betas":
        betas = [arguments.get("adam_beta1", 0.9), arguments.get("adam_beta2", 0.999)]
        return betas, f"{key} was auto: {betas}, from adam_beta1 and adam_beta2"
    if key == "scheduler.params.warmup_min_lr":
        return 0.0, f"{key} was auto: 0"
    if key == "train_batch_size":
        return None, f"{key} was auto: micro x accumulation x processes"
    if key == "scheduler.params.warmup_num_steps" and (steps := _share_of_warmup(arguments)):
        return steps, f"{key} was auto: {steps}, from warmup_ratio"
    if key not in ARGUMENTS:
        return None, "was auto: xtrain derives it from the model"
    argument, default = ARGUMENTS[key]
    given_value = arguments.get(argument)
    value = default if given_value is None else given_value
    if argument == "max_steps" and value <= 0:
        return None, f"{key} was auto, and max_steps is not given"
    given = argument if given_value is not None else f"the default of {argument}"
    return value, f"{key} was auto: {value}, {given}"


def _share_of_warmup(arguments: Mapping[str, Any]) -> int:
    """warmup_ratio as Hugging Face takes it, where warmup_steps is not given; 0 where it is not either."""
    ratio, steps = arguments.get("warmup_ratio") or 0, arguments.get("max_steps") or 0
    return 0 if arguments.get("warmup_steps") else math.ceil(max(0, steps) * ratio)
