"""ds_config -> spec: what the spec has words for, as overrides what it has not, and a list of the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.contract import Problem
from xtrain.errors import SpecError
from xtrain.spec.fits import fits
from xtrain.spec.keys import covering
from xtrain.spec.problems import find_faults, shown, translate
from xtrain.spec.schema import describe
from xtrain.spec.tree import Spec
from xtrain.translation import Imported, Tree, placed

from .auto import resolve_auto
from .import_batch import import_batch
from .import_schedule import import_optimizer, import_schedule
from .known_keys import KNOWN, REMOVED
from .leaves import Leaves
from .overrides import FIXED, OWNERS, is_section, leaves, nearest
from .translate import NEVER, engine_settings
from .zero import STAGES

OFFLOADS = {"offload_optimizer": "optimizer", "offload_param": "parameters"}
SILENT = ("zero_allow_untested_optimizer", "zero_optimization.memory_efficient_linear")
"""Keys of ours that say nothing about a training."""


def import_config(
    config: Mapping[str, Any], world: int | None = None, arguments: Mapping[str, Any] | None = None
) -> Imported:
    """A spec without model and data from a ds_config; SpecError where a value is of a wrong kind.

    "auto" is resolved as Hugging Face's Trainer does, from `arguments` (TrainingArguments) or their defaults.
    """
    flat, chosen = resolve_auto(dict(leaves(config)), arguments or {})
    if problems := _wrong_kinds(flat):
        raise SpecError("the ds_config", problems)
    found = Leaves(flat, dict(chosen))
    tree: Tree = {}
    for section in (import_batch(found, world), _train(found), _zero(found), _precision(found), _log(found)):
        placed(tree, section)
    placed(tree, import_optimizer(found))
    placed(tree, import_schedule(found))
    placed(tree, _checkpointing(found))
    if rest := _overrides(found, tree):
        tree["deepspeed"] = rest
    return Imported(tree, found.chosen, tuple(found.left_out))


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
    tree: Tree = {"memory.sharding": next(name for name, one in STAGES.items() if one == stage)}
    for name, ours in OFFLOADS.items():
        device = found.take(f"{block}.{name}.device", "none")
        path = found.take(f"{block}.{name}.nvme_path", None)
        if device == "none":
            found.drop(f"{block}.{name}.")
        elif name == "offload_param" and stage < 3:
            found.drop(f"{block}.{name}.")
            found.left_out.append(f"{block}.{name}: has no effect below stage 3")
        else:
            tree[f"memory.offload.{ours}"] = {"device": device, "path": path} if device == "nvme" else device
    for name, ours in (("cpu_offload", "optimizer"), ("cpu_offload_param", "parameters")):
        if found.take(f"{block}.{name}", None):
            tree[f"memory.offload.{ours}"] = "cpu"
            found.say(f"memory.offload.{ours}", f"{name} is the old form of it")
    return tree


def _precision(found: Leaves) -> Tree:
    on = {name: found.take(f"{name}.enabled", False) for name in ("bf16", "fp16", "torch_autocast")}
    if sum(map(bool, on.values())) > 1:
        both = ", ".join(f"{name}.enabled" for name, enabled in on.items() if enabled)
        raise SpecError("the ds_config", [Problem(both, "true", "expected one precision")])
    for name in (name for name, enabled in on.items() if not enabled):
        found.drop(f"{name}.")
    if on["bf16"]:
        return {"precision": {"dtype": "bf16", "weights": "bf16"}}
    if on["fp16"]:
        return {"precision": {"dtype": "fp16", "weights": "fp16", **_scaler(found)}}
    return {"precision": _autocast(found) if on["torch_autocast"] else "fp32"}


def _scaler(found: Leaves) -> Tree:
    keys = ("loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale")
    given = {key: found.take(f"fp16.{key}", None) for key in keys}
    if given["loss_scale"]:  # with a fixed scale the others have no effect
        return {"loss_scale": float(given["loss_scale"])}
    floats = ("loss_scale", "min_loss_scale")
    return {k: float(v) if k in floats else int(v) for k, v in given.items() if v is not None}


def _autocast(found: Leaves) -> Tree:
    dtype = found.take("torch_autocast.dtype", "bfloat16")
    if found.take("torch_autocast.lower_precision_safe_modules", None) != []:
        found.left_out.append(
            "torch_autocast.lower_precision_safe_modules: all gradients are reduced in fp32 here"
        )
    short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)
    return {"dtype": short, "weights": "fp32"}


def _log(found: Leaves) -> Tree:
    tree: Tree = {}
    every = found.take("steps_per_print", NEVER)
    if every != NEVER:
        tree["log.every_steps"] = int(every)
        found.say("log.every_steps", "from steps_per_print")
    trackers = []
    for name in ("tensorboard", "wandb"):
        if found.take(f"{name}.enabled", False):
            trackers.append(name)
        else:
            found.drop(f"{name}.")
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


def _overrides(found: Leaves, tree: Tree) -> dict[str, Any]:
    """What the spec has no word for and xtrain would set otherwise; the rest goes onto the list."""
    rest: Tree = {}
    derived = _derived(tree)
    for key, value in found.remaining():
        if (reason := _not_carried(key)) is None:
            number = int(value) if KNOWN[key].get("type") == "integer" else value
            if number != derived.get(key, KNOWN[key].get("default")):
                placed(rest, {key: number})
        elif value not in (False, None, "none", {}, []) and key not in SILENT and derived.get(key) != value:
            found.left_out.append(f"{key}: {shown(value)}: {reason}")
    return rest


def _not_carried(key: str) -> str | None:
    """Why a key is not put into `deepspeed:`; None where it is."""
    if removed := covering(key, REMOVED):
        return REMOVED[removed]
    if key not in KNOWN:
        return f"unknown to DeepSpeed; {nearest(key)}"
    if fixed := covering(key, FIXED):
        return FIXED[fixed]
    if owner := covering(key, OWNERS):
        return f"the spec has no word for it beside {OWNERS[owner]}"
    return None


def _derived(tree: Tree) -> dict[str, Any]:
    """What xtrain sets whatever the model is; None for what it would derive from the model's size."""
    with_size, without = (_settings(tree, model) for model in ({"preset": "gpt2"}, {"factory": "stand:in"}))
    return {key: without.get(key) for key in with_size}


def _settings(tree: Tree, model: Tree) -> dict[str, Any]:
    sections: Tree = {name: tree[name] for name in ("batch", "memory", "precision") if name in tree}
    rest = {"data": {"source": "synthetic"}, "train": {"steps": 1}, "optimizer": {"lr": 1.0}}
    data: Tree = {"model": model, **rest, **sections}
    if problems := translate(find_faults(data), data):
        raise SpecError("the spec made from the ds_config", problems)
    spec = Spec.model_validate(data)
    world = tree.get("launch", {}).get("processes", 1)
    return {setting.key: setting.value for setting in engine_settings(spec, world)}
