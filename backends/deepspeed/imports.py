"""ds_config -> spec: what the spec has words for, as overrides what it has not, and a list of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.contract import Problem
from xtrain.errors import SpecError
from xtrain.exchange.translation import Imported, Tree, placed
from xtrain.spec.fits import fits
from xtrain.spec.keys import covering
from xtrain.spec.problems import shown
from xtrain.spec.schema import describe
from xtrain.spec.tree import STAGES

from .auto import SPEC_KEYS, added_by_trainer, contradictions, resolve_auto
from .import_batch import import_batch
from .import_overrides import import_overrides, settings_with_sizes
from .import_schedule import import_optimizer, import_schedule
from .known_keys import KNOWN
from .leaves import Leaves
from .overrides import OWNERS, is_section, leaves, nearest
from .translate import NEVER

OFFLOADS = {"offload_optimizer": ("optimizer", 1), "offload_param": ("parameters", 3)}
"""What the spec calls it, and the ZeRO stage from which on DeepSpeed does it."""
OLD_FORMS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}


def import_config(
    config: Mapping[str, Any], world: int | None = None, arguments: Mapping[str, Any] | None = None
) -> Imported:
    """A spec without model and data from a ds_config; SpecError where a value is of a wrong kind.

    "auto" is resolved as Hugging Face's Trainer does, from `arguments` (TrainingArguments) or their defaults.
    """
    given = {key: value for key, value in leaves(config) if not _unsaid(key, value)}
    arguments = arguments or {}
    filled = resolve_auto(given, arguments, added_by_trainer(given, arguments))
    if problems := _wrong_kinds(filled.values):
        raise SpecError("the ds_config", problems)
    found = Leaves(filled.values, filled.chosen)
    tree: Tree = {}
    for section in (
        import_batch(found, world),
        _train(found),
        _zero(found),
        _precision(found),
        _log(found, arguments),
    ):
        placed(tree, section)
    placed(tree, import_optimizer(found))
    placed(tree, import_schedule(found))
    placed(tree, _checkpointing(found))
    if rest := import_overrides(found, tree):
        tree["deepspeed"] = rest
    for key in filled.left_open:
        _say_left_open(key, tree, found)
    found.left_out += contradictions(given, arguments, tree.get("launch", {}).get("processes", 1))
    return Imported(tree, found.chosen, tuple(found.left_out))


def _say_left_open(key: str, tree: Tree, found: Leaves) -> None:
    """What became of an "auto" that Hugging Face does not fill either, or only once the model is there."""
    if key not in KNOWN and key not in SPEC_KEYS:
        found.left_out.append(f"{key}: 'auto': unknown to DeepSpeed; {nearest(key)}")
        return
    owner = covering(key, OWNERS)
    spec_key = SPEC_KEYS.get(key) or (OWNERS[owner] if owner else f"deepspeed.{key}")
    sized, unsized = settings_with_sizes(tree)
    if key in sized and key not in unsized:
        found.chosen[spec_key] = f"{key} was auto: xtrain derives it from the model"
        return
    value = sized.get(key, KNOWN.get(key, {}).get("default"))
    became = "left out" if value is None else shown(value)
    found.chosen[spec_key] = f"{key} was auto, which nobody fills: {became}"


def _unsaid(key: str, value: Any) -> bool:
    """null for a section, or where DeepSpeed has no default, such as `number_checkpoints`."""
    known = is_section(key) or (key in KNOWN and "default" not in KNOWN[key])
    return value is None and known


def _wrong_kinds(flat: Mapping[str, Any]) -> list[Problem]:
    kinds = [
        Problem(key, shown(value), f"expected {describe(KNOWN[key])}")
        for key, value in flat.items()
        if key in KNOWN and not fits(value, KNOWN[key])
    ]
    old_form = ("zero_optimization", bool)  # true was stage 1 once
    return kinds + [
        Problem(key, shown(value), "expected a section")
        for key, value in flat.items()
        if is_section(key) and value not in ({}, None) and (key, type(value)) != old_form
    ]


def _train(found: Leaves) -> Tree:
    clip = found.take("gradient_clipping", 0.0)
    return {"train.clip": float(clip) or None}


def _zero(found: Leaves) -> Tree:
    block = "zero_optimization"
    if isinstance(old := found.take(block, None), bool):
        found.say(
            "memory.sharding", f"zero_optimization: {str(old).lower()} is the old form of stage {int(old)}"
        )
    stage = found.take(f"{block}.stage", int(old) if isinstance(old, bool) else 0)
    tree: Tree = {"memory.sharding": STAGES[stage]}
    _renew(found, block)
    for name, (ours, least) in OFFLOADS.items():
        device = found.get(f"{block}.{name}.device", None) or "none"
        if device == "none" or stage < least:
            why = "nothing is offloaded" if device == "none" else f"no effect below stage {least}"
            found.drop(f"{block}.{name}.", why)
            continue
        tree[f"memory.offload.{ours}"] = found.take(f"{block}.{name}.device", "none")
        if device == "nvme":
            path = found.take(f"{block}.{name}.nvme_path", None)
            tree[f"memory.offload.{ours}"] = {"device": device, "path": path}
    return tree


def _renew(found: Leaves, block: str) -> None:
    """The old forms of an offload to the CPU, in the words of today."""
    for old, new in OLD_FORMS.items():
        if found.take(f"{block}.{old}", None):
            found.give(f"{block}.{new}.device", "cpu")
            said = f"{block}.{old} is the old form of {new}.device: cpu"
            found.say(f"memory.offload.{OFFLOADS[new][0]}", said)


def _precision(found: Leaves) -> Tree:
    on = {name: found.take(f"{name}.enabled", False) for name in ("bf16", "fp16", "torch_autocast")}
    if sum(map(bool, on.values())) > 1:
        both = ", ".join(f"{name}.enabled" for name, enabled in on.items() if enabled)
        raise SpecError("the ds_config", [Problem(both, "true", "expected one precision")])
    for name in (name for name, enabled in on.items() if not enabled):
        found.drop(f"{name}.", f"{name} is not enabled")
    if on["bf16"]:
        return {"precision": {"dtype": "bf16", "weights": "bf16"}}
    if on["fp16"]:
        return {"precision": {"dtype": "fp16", "weights": "fp16", **_scaler(found)}}
    return {"precision": _autocast(found) if on["torch_autocast"] else "fp32"}


def _scaler(found: Leaves) -> Tree:
    """Of the fp16 block; with a fixed scale the other keys have no effect."""
    if scale := found.take("fp16.loss_scale", 0):
        for key in DYNAMIC_SCALE:
            found.drop(f"fp16.{key}", "no effect with a fixed loss_scale")
        return {"loss_scale": float(scale)}
    given = {key: found.take(f"fp16.{key}", None) for key in DYNAMIC_SCALE}
    return {k: float(v) if k == "min_loss_scale" else int(v) for k, v in given.items() if v is not None}


DYNAMIC_SCALE = ("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")


def _autocast(found: Leaves) -> Tree:
    dtype = found.take("torch_autocast.dtype", "bfloat16")
    if found.take("torch_autocast.lower_precision_safe_modules", None) != []:
        found.left_out.append(
            "torch_autocast.lower_precision_safe_modules: all gradients are reduced in fp32 here"
        )
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)
    return {"dtype": short, "weights": "fp32"}


def _log(found: Leaves, arguments: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    every = found.take("steps_per_print", NEVER)
    if every != NEVER and arguments:
        found.left_out.append(f"steps_per_print: {every}: how often to log is said by logging_steps")
    elif every != NEVER:
        tree["log.every_steps"] = int(every)
        found.say("log.every_steps", "from steps_per_print")
    trackers = []
    for name in ("tensorboard", "wandb"):
        if found.take(f"{name}.enabled", False):
            trackers.append(name)
        else:
            found.drop(f"{name}.", f"{name} is not enabled")
    return {**tree, "log.trackers": trackers} if trackers else tree


def _checkpointing(found: Leaves) -> Tree:
    """The block only sets up deepspeed.checkpointing; that it sets anything is taken for its being used."""
    block = "activation_checkpointing"
    number = found.take(f"{block}.number_checkpoints", None)
    on_cpu = found.take(f"{block}.cpu_checkpointing", False)
    partitioned = found.get(f"{block}.partition_activations", False)
    if not (number or on_cpu or partitioned):
        return {}
    if not number:
        found.say("memory.checkpointing", "the config does not say which layers: every one")
    tree: Tree = {"memory.checkpointing": {"number": int(number)} if number else {"every": 1}}
    if on_cpu:
        tree["memory.offload.activations"] = "cpu"
    return tree
