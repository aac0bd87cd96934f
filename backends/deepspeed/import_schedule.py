"""optimizer and scheduler of a ds_config -> `optimizer`, `schedule` and `train.steps`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.contract import Problem
from xtrain.errors import SpecError
from xtrain.exchange.translation import Tree
from xtrain.spec.fits import fits
from xtrain.spec.problems import shown
from xtrain.spec.schema import Schema, describe

from .leaves import Leaves

NUMBER: Schema = {"type": "number", "minimum": 0}
COUNT: Schema = {"type": "integer", "minimum": 0}
SCHEDULER_PARAMS: dict[str, Schema] = {
    "warmup_min_lr": NUMBER,
    "warmup_max_lr": NUMBER,
    "warmup_num_steps": COUNT,
    "total_num_steps": {"type": "integer", "minimum": 1},
    "last_batch_iteration": {"type": "integer", "minimum": -1},
    "cos_min_ratio": {"type": "number", "minimum": 0, "maximum": 1},
    "warmup_type": {"enum": ["linear", "log"]},
}
PARAMS: dict[str, Schema] = {
    "lr": NUMBER,
    "eps": NUMBER,
    "weight_decay": NUMBER,
    "momentum": NUMBER,
    "betas": {"type": "array", "items": {**NUMBER, "maximum": 1}, "minItems": 2, "maxItems": 2},
    **SCHEDULER_PARAMS,
}
ADAMS = ("adam", "adamw")
WITHOUT_MEANING = {"torch_adam", "foreach", "fused", "adam_w_mode"}
USUAL = {
    "amsgrad": False,
    "bias_correction": True,
    "weight_decay": 0,
    "dampening": 0,
    "nesterov": False,
    "maximize": False,
}
"""What the optimizers do unless told otherwise, and the only thing that the spec's do."""
SCHEDULERS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
"""Those with a formula of the spec's."""
LATE = "DeepSpeed's scheduler has at update k + 1 what xtrain has at k"


def import_optimizer(found: Leaves) -> Tree:
    """Nothing where the config has none."""
    kind = found.take("optimizer.type", None)
    params = _params(found, "optimizer.params")
    if kind is None:
        if params:
            found.left_out.append("optimizer.params: without optimizer.type they have no effect")
        return {}
    name = "sgd" if kind.lower() == "sgd" else "adamw"
    if kind.lower() not in (*ADAMS, "sgd"):
        found.left_out.append(f"optimizer.type: {shown(kind)}: xtrain has adamw and sgd; adamw was written")
    elif params.get("adam_w_mode") is False:
        found.left_out.append(
            "optimizer.params.adam_w_mode: false: weight decay is apart from the gradient here"
        )
    keys = ("lr", "momentum") if name == "sgd" else ("lr", "betas", "eps", "weight_decay")
    tree: Tree = {"optimizer.name": name}
    for key in keys:
        if key in params:
            value = params.pop(key)
            tree[f"optimizer.{key}"] = [float(one) for one in value] if key == "betas" else float(value)
    if name == "adamw":
        _state_defaults(tree, found, bool(params.get("torch_adam")))
    if not tree.get("optimizer.lr"):
        tree.pop("optimizer.lr", None)  # 0 before the first step of a scheduler that knows the peak
    unused = sorted(
        key for key in set(params) - WITHOUT_MEANING if key not in USUAL or params[key] != USUAL[key]
    )
    found.left_out += [
        f"optimizer.params.{key}: {shown(params[key])}: no such key in the spec" for key in unused
    ]
    return tree


def _state_defaults(tree: Tree, found: Leaves, torch_adam: bool) -> None:
    """What the optimizer would have by itself, where the config leaves it to it."""
    whose = "torch's AdamW" if torch_adam else "DeepSpeed's Adam"
    for key, default in (("betas", [0.9, 0.999]), ("weight_decay", 0.01 if torch_adam else 0.0)):
        if f"optimizer.{key}" not in tree:
            tree[f"optimizer.{key}"] = default
            found.say(f"optimizer.{key}", f"{default}: the default of {whose}")
    if tree["optimizer.weight_decay"]:
        why = "on matrices only here; a plain script decays what its parameter groups say"
        found.chosen.setdefault("optimizer.weight_decay", why)


def import_schedule(found: Leaves) -> Tree:
    """The schedule with the same formula; nothing where the config has none."""
    kind = found.take("scheduler.type", None)
    params = _params(found, "scheduler.params")
    if kind is None:
        if params:
            found.left_out.append("scheduler.params: without scheduler.type they have no effect")
        return {}
    if kind not in SCHEDULERS:
        found.left_out.append(
            f"scheduler.type: {shown(kind)}, with its params: no such schedule here; constant was written"
        )
        return {"schedule": {"name": "constant"}}
    found.left_out += [
        f"scheduler.params.{key}: {shown(value)}: no such key in the spec"
        for key, value in params.items()
        if key not in SCHEDULER_PARAMS and value
    ]
    late = params.get("last_batch_iteration", -1) < 0
    skipped = 0 if late else int(params["last_batch_iteration"]) + (kind == "WarmupCosineLR")
    if late:
        found.say("schedule", LATE)
    tree: Tree = {"schedule": _formula(kind, params, skipped, found)}
    if params.get("warmup_max_lr"):
        tree["optimizer.lr"] = float(params["warmup_max_lr"])
    if params.get("warmup_min_lr"):
        found.left_out.append(
            f"scheduler.params.warmup_min_lr: {params['warmup_min_lr']}: warm-up starts at 0 here"
        )
    if "total_num_steps" in params:
        tree["train.steps"] = int(params["total_num_steps"]) - skipped
        found.chosen.setdefault("train.steps", "from total_num_steps")
    return tree


def _formula(kind: str, params: Mapping[str, Any], skipped: int, found: Leaves) -> Tree:
    """`skipped`: by how many updates the scheduler starts ahead (standalone.py says why)."""
    warmup = max(0, int(params.get("warmup_num_steps", 1000)) - skipped)
    shape = params.get("warmup_type", "log")
    if kind == "WarmupDecayLR":
        return {"name": "warmup-decay", "warmup": warmup, "warmup_type": shape}
    if shape == "log" and warmup > 1:
        found.left_out.append(f"scheduler.params.warmup_type: log: the warm-up is linear here with {kind}")
    if kind == "WarmupLR":
        return {"name": "constant", "warmup": warmup}
    return {"name": "cosine", "warmup": warmup, "min_ratio": float(params.get("cos_min_ratio", 1e-4))}


def _params(found: Leaves, key: str) -> dict[str, Any]:
    """The block's params, each of the kind that it has to be."""
    params: dict[str, Any] = dict(found.take(key, {}))
    problems = [
        Problem(f"{key}.{name}", shown(value), f"expected {describe(PARAMS[name])}")
        for name, value in params.items()
        if name in PARAMS and not fits(value, PARAMS[name])
    ]
    if problems:
        raise SpecError("the ds_config", problems)
    return params
