"""A ds_config beside Hugging Face's TrainingArguments: what fills an "auto", what is added, what contradicts.

The rules are those of transformers' integrations/deepspeed.py, and for what is added accelerate's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from xtrain.exchange.training_arguments import updates, warmup_steps
from xtrain.spec.fits import is_number
from xtrain.spec.problems import shown

from .overrides import is_section

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


@dataclass(frozen=True)
class Filled:
    """A ds_config without any "auto"."""

    values: dict[str, Any]
    chosen: dict[str, str]
    """By spec key, what an "auto" became and from where."""
    left_open: list[str]
    """Keys whose "auto" nothing fills; they are not among the values."""


def resolve_auto(
    flat: Mapping[str, Any], arguments: Mapping[str, Any], added: Collection[str] = ()
) -> Filled:
    """Each "auto", and what is `added`, as the Trainer fills it: from `arguments` or their defaults."""
    found = Filled({}, {}, [])
    for key, value in {**flat, **dict.fromkeys(added, "auto")}.items():
        if isinstance(value, Mapping) and key.endswith(".params"):
            below = resolve_auto({f"{key}.{name}": one for name, one in value.items()}, arguments)
            found.values[key] = {name.removeprefix(f"{key}."): one for name, one in below.values.items()}
            found.chosen.update(below.chosen)
            found.left_open.extend(below.left_open)
        elif value != "auto" or is_section(key):
            found.values[key] = value
        else:
            _fill(key, arguments, found, "is not there" if key in added else "was auto")
    return found


def _fill(key: str, arguments: Mapping[str, Any], found: Filled, state: str) -> None:
    spec_key = SPEC_KEYS.get(key, "")
    if key == "train_batch_size":
        found.chosen[spec_key] = f"{key} {state}: micro x accumulation x processes"
    elif (filling := argument_for(key, arguments)) is not None:
        value, source = filling
        found.values[key] = value
        before = f"{found.chosen[spec_key]}; " if spec_key in found.chosen else ""
        found.chosen[spec_key] = f"{before}{key} {state}: {shown(value)}, {source}"
    else:
        found.left_open.append(key)


def argument_for(key: str, arguments: Mapping[str, Any]) -> tuple[Any, str] | None:
    """What the Trainer has for a key of the ds_config, and which argument says so; None if it has nothing."""
    if key == "optimizer.params.betas":
        betas = [arguments.get("adam_beta1", 0.9), arguments.get("adam_beta2", 0.999)]
        return betas, "adam_beta1 and adam_beta2"
    if key == "scheduler.params.warmup_min_lr":
        return 0.0, "as with the Trainer"
    if key == "scheduler.params.warmup_num_steps":
        given = [name for name in ("warmup_steps", "warmup_ratio") if arguments.get(name)]
        source = given[0] if given else "the default of warmup_steps"
        return warmup_steps(arguments, updates(arguments)), source
    if key not in ARGUMENTS:
        return None
    argument, default = ARGUMENTS[key]
    value = arguments.get(argument)
    source = argument if value is not None else f"the default of {argument}"
    value = default if value is None else value
    if argument == "max_steps" and value <= 0:
        return None
    return value, source


def added_by_trainer(flat: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[str]:
    """Keys that a Trainer with these arguments adds to a ds_config that lacks them."""
    added = [f"{name}.enabled" for name in PRECISIONS if arguments.get(name) and not _has_block(flat, name)]
    if arguments and flat.keys().isdisjoint(BATCH):
        added += BATCH[1:]
    return added


PRECISIONS = ("bf16", "fp16")
BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def _has_block(flat: Mapping[str, Any], name: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for key in flat)


def contradictions(flat: Mapping[str, Any], arguments: Mapping[str, Any], world: int) -> Iterator[str]:
    """What the arguments say otherwise than the ds_config, a sentence each; the ds_config's is taken."""
    if not arguments:
        return
    for key, value in _with_params(flat):
        if value in (None, "auto") or key == "scheduler.params.warmup_min_lr":
            continue
        theirs, source = _theirs(key, arguments, world)
        if theirs is not None and not _same(key, value, theirs):
            which = "was taken; Hugging Face's Trainer refuses such a pair"
            yield f"{source}: {shown(theirs)}: {key} of the ds_config, {shown(value)}, {which}"
    if "gradient_clipping" not in flat and (norm := arguments.get("max_grad_norm", 1.0)):
        why = "DeepSpeed clips nothing, as the ds_config has no gradient_clipping"
        yield f"max_grad_norm: {shown(norm)}: {why}"


def _with_params(flat: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in flat.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", one) for name, one in value.items())
        else:
            yield key, value


def _theirs(key: str, arguments: Mapping[str, Any], world: int) -> tuple[Any, str]:
    """As `argument_for`, but for all processes together too."""
    if key != BATCH[0]:
        return argument_for(key, arguments) or (None, "")
    (micro, _), (passes, _) = (argument_for(one, arguments) or (1, "") for one in BATCH[1:])
    return micro * passes * world, f"per_device_train_batch_size x passes x {world} processes"


def _same(key: str, ours: Any, theirs: Any) -> bool:
    if key == "scheduler.params.warmup_num_steps":
        theirs = max(1, theirs)  # DeepSpeed takes no 0
    return bool(ours == theirs) and (is_number(ours) == is_number(theirs))
