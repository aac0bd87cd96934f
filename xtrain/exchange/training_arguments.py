"""Hugging Face TrainingArguments, as JSON, -> the parts of a spec that they tell."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from xtrain.contract import Problem
from xtrain.exchange.translation import Imported, Tree, placed
from xtrain.spec.fits import fits, is_number
from xtrain.spec.problems import shown
from xtrain.spec.schema import Schema, describe

TELLTALE = frozenset(
    {
        "per_device_train_batch_size",
        "learning_rate",
        "output_dir",
        "num_train_epochs",
        "max_steps",
        "lr_scheduler_type",
        "max_grad_norm",
        "gradient_checkpointing",
    }
)
"""Keys by which the file is known; no ds_config has one of them at its top level."""
NUMBER: Schema = {"type": "number", "minimum": 0}
COUNT: Schema = {"type": "integer", "minimum": 1}
NATURAL: Schema = {"type": "integer", "minimum": 0}
FLAG: Schema = {"type": "boolean"}
TEXT: Schema = {"type": "string"}
OPTIONAL_TEXT: Schema = {"anyOf": [TEXT, {"type": "null"}]}
KINDS: dict[str, Schema] = {
    "per_device_train_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "learning_rate": {"type": "number", "exclusiveMinimum": 0},
    "weight_decay": NUMBER,
    "adam_beta1": NUMBER,
    "adam_beta2": NUMBER,
    "adam_epsilon": NUMBER,
    "max_grad_norm": {"anyOf": [NUMBER, {"type": "null"}]},
    "max_steps": {"type": "integer"},
    "num_train_epochs": {"type": "number"},
    "lr_scheduler_type": TEXT,
    "lr_scheduler_kwargs": {"anyOf": [{"type": "object"}, TEXT, {"type": "null"}]},
    "warmup_steps": NUMBER,
    "warmup_ratio": {"anyOf": [{**NUMBER, "maximum": 1}, {"type": "null"}]},
    "optim": TEXT,
    "seed": NATURAL,
    "bf16": FLAG,
    "fp16": FLAG,
    "gradient_checkpointing": FLAG,
    "torch_compile": FLAG,
    "logging_steps": NUMBER,
    "save_strategy": TEXT,
    "save_steps": NUMBER,
    "save_total_limit": {"anyOf": [COUNT, {"type": "null"}]},
    "eval_strategy": TEXT,
    "evaluation_strategy": TEXT,
    "eval_steps": {"anyOf": [NUMBER, {"type": "null"}]},
    "load_best_model_at_end": FLAG,
    "metric_for_best_model": OPTIONAL_TEXT,
    "greater_is_better": {"anyOf": [FLAG, {"type": "null"}]},
    "report_to": {"anyOf": [TEXT, {"type": "array", "items": TEXT}, {"type": "null"}]},
    "deepspeed": {"anyOf": [{"type": "object"}, OPTIONAL_TEXT]},
}
"""What is read, and of which kind it has to be; a number of steps below 1 is a share of max_steps."""
STEPS = 1000
"""Where the arguments count in epochs."""
SHARES = ("warmup_steps", "warmup_ratio", "logging_steps", "save_steps", "eval_steps")
"""Of all updates, where below 1."""
NOTHING: tuple[object, ...] = (None, False, "", [], {}, 0, -1, "no", "none", "auto")


def is_training_arguments(data: Mapping[str, Any]) -> bool:
    return not TELLTALE.isdisjoint(data)


def check_arguments(arguments: Mapping[str, Any]) -> list[Problem]:
    """Values that are of a wrong kind, or contradict each other."""
    problems = [
        Problem(key, shown(arguments[key]), f"expected {describe(schema)}")
        for key, schema in KINDS.items()
        if key in arguments and not fits(arguments[key], schema)
    ]
    if arguments.get("bf16") is True and arguments.get("fp16") is True:
        problems.append(Problem("bf16, fp16", "true", "expected at most one of them"))
    return problems


def import_arguments(arguments: Mapping[str, Any], world: int) -> Imported:
    """The spec for `world` processes, less model and data; `check_arguments` has no problem with them."""
    tree: Tree = {}
    chosen: dict[str, str] = {}
    left_out: list[str] = []
    given = {key: value for key, value in arguments.items() if value is not None}
    placed(tree, _batch(given, world, chosen))
    placed(tree, _train(given, chosen))
    placed(tree, _optimizer(given, left_out))
    steps = tree["train"]["steps"]
    placed(tree, {"schedule": _schedule(given, steps, left_out)})
    placed(tree, _surroundings(given, steps, left_out))
    placed(tree, _best(given, "eval_every" in tree["train"], chosen, left_out))
    others = sorted(key for key in set(given) - set(KINDS) if given[key] not in NOTHING)
    if others:
        left_out.append(f"without a counterpart in the spec: {', '.join(others)}")
    return Imported(tree, chosen, left_out)


def _batch(given: Mapping[str, Any], world: int, chosen: dict[str, str]) -> Tree:
    micro = int(given.get("per_device_train_batch_size", 8))
    passes = int(given.get("gradient_accumulation_steps", 1))
    chosen["batch.global"] = f"{micro} x {passes} passes x {world} process{'es' * (world > 1)}"
    tree: Tree = {"batch.global": micro * passes * world, "batch.micro": micro}
    return {**tree, "launch.processes": world} if world > 1 else tree


def _train(given: Mapping[str, Any], chosen: dict[str, str]) -> Tree:
    if given.get("max_steps", -1) <= 0:
        epochs = given.get("num_train_epochs", 3)
        said = [f"a stand-in: {epochs} epochs are as many updates as the data has"]
        said += [f"{key} is a share of it" for key in SHARES if 0 < given.get(key, 0) < 1]
        chosen["train.steps"] = "; ".join(said)
    clip = float(given.get("max_grad_norm", 1.0))
    seed = int(given.get("seed", 42))
    return {"train.steps": updates(given), "train.seed": seed, "train.clip": clip or None}


def updates(given: Mapping[str, Any]) -> int:
    """How many the Trainer makes; a stand-in where the arguments count in epochs."""
    most = int(given.get("max_steps") or -1)
    return most if most > 0 else STEPS


def _optimizer(given: Mapping[str, Any], left_out: list[str]) -> Tree:
    name, rate = given.get("optim", "adamw_torch"), float(given.get("learning_rate", 5e-5))
    decay = float(given.get("weight_decay", 0.0))
    if name == "sgd":
        if decay:
            left_out.append(f"weight_decay: {decay:g}: sgd has none here")
        return {"optimizer": {"name": "sgd", "lr": rate}}
    if not name.startswith("adamw_torch"):
        left_out.append(f"optim: {shown(name)}: xtrain has adamw and sgd; adamw was written")
    betas = [float(given.get("adam_beta1", 0.9)), float(given.get("adam_beta2", 0.999))]
    eps = float(given.get("adam_epsilon", 1e-8))
    return {"optimizer": {"name": "adamw", "lr": rate, "betas": betas, "eps": eps, "weight_decay": decay}}


def _schedule(given: Mapping[str, Any], steps: int, left_out: list[str]) -> Tree:
    kind = given.get("lr_scheduler_type", "linear")
    extra = _scheduler_kwargs(given, kind, left_out)
    warmup = warmup_steps(given, steps)
    match kind:
        case "linear":
            return {"name": "linear", "warmup": warmup}
        case "constant":
            return {"name": "constant"}
        case "constant_with_warmup":
            return {"name": "constant", "warmup": warmup}
        case "cosine" | "cosine_with_min_lr" if (floor := _floor(kind, given, extra)) is not None:
            cycles = extra.get("num_cycles", 0.5)
            return {"name": "cosine", "warmup": warmup, "min_ratio": floor, "cycles": cycles}
    left_out.append(f"lr_scheduler_type: {shown(kind)}: not carried over; linear was written")
    return {"name": "linear", "warmup": warmup}


SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
}


def _floor(kind: str, given: Mapping[str, Any], extra: Mapping[str, float]) -> float | None:
    """The least learning rate as a share of the peak; None where it ought to be given and is not."""
    if "min_lr" in extra:
        return extra["min_lr"] / float(given.get("learning_rate", 5e-5))
    return extra.get("min_lr_rate", 0.0 if kind == "cosine" else None)


def _scheduler_kwargs(given: Mapping[str, Any], kind: str, left_out: list[str]) -> dict[str, float]:
    """Those that the schedule of that kind takes, numbers; the others are named."""
    found = given.get("lr_scheduler_kwargs") or {}
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = {found: True}
    if not isinstance(found, dict):
        found = {shown(found): True}
    taken = {
        key: float(value)
        for key, value in found.items()
        if key in SCHEDULER_KWARGS.get(kind, ()) and is_number(value)
    }
    rest = sorted(str(key) for key, value in found.items() if key not in taken and value is not None)
    left_out += [f"lr_scheduler_kwargs: {key}: not carried over" for key in rest]
    return taken


def _surroundings(given: Mapping[str, Any], steps: int, left_out: list[str]) -> Tree:
    """Precision, checkpointing, saving, evaluating, logging."""
    dtype = "bf16" if given.get("bf16") else "fp16" if given.get("fp16") else "fp32"
    tree: Tree = {"precision": {"dtype": dtype, "weights": "fp32"} if dtype == "fp16" else dtype}
    if given.get("gradient_checkpointing"):
        tree["memory.checkpointing"] = {"every": 1}
    if given.get("torch_compile"):
        tree["train.compile"] = True
    logging = max(1, _steps(given.get("logging_steps", 500), steps))
    tree["log.every_steps"] = logging
    if (saving := given.get("save_strategy", "steps")) == "steps" and given.get("save_steps", 500):
        tree["checkpoint.every_steps"] = max(1, _steps(given.get("save_steps", 500), steps))
    if "save_total_limit" in given:
        tree["checkpoint.keep"] = int(given["save_total_limit"])
    evaluating = given.get("eval_strategy", given.get("evaluation_strategy", "no"))  # its name until 4.46
    if evaluating == "steps":
        tree["train.eval_every"] = max(1, _steps(given.get("eval_steps", logging), steps))
    for key, strategy in (("save_strategy", saving), ("eval_strategy", evaluating)):
        if strategy not in ("steps", "no"):
            left_out.append(f"{key}: {shown(strategy)}: here it goes by updates, or not at all")
    asked = given.get("report_to", [])
    asked = [asked] if isinstance(asked, str) else asked
    if trackers := [name for name in TRACKERS if name in asked]:
        tree["log.trackers"] = trackers
    others = [name for name in asked if name not in (*TRACKERS, "none")]
    left_out += [f"report_to: {shown(name)}: not a tracker of xtrain's" for name in others]
    return tree


TRACKERS = ("tensorboard", "wandb")


def _best(given: Mapping[str, Any], evaluates: bool, chosen: dict[str, str], left_out: list[str]) -> Tree:
    """The best checkpoint is kept, where it is told by the same number as here."""
    key = "load_best_model_at_end"
    if not given.get(key):
        return {}
    metric = given.get("metric_for_best_model", "loss")
    if metric not in ("loss", "eval_loss") or given.get("greater_is_better"):
        better = "greatest" if given.get("greater_is_better", not metric.endswith("loss")) else "least"
        left_out.append(
            f"{key}: by the {better} {shown(metric)}: here the best is that of the least eval_loss"
        )
        return {}
    if not evaluates:
        left_out.append(f"{key}: the spec that was written evaluates nothing; see train.eval_every")
        return {}
    chosen["checkpoint.best"] = f"{key}: the best is kept; a run ends with its last weights all the same"
    return {"checkpoint.best": True}


def warmup_steps(given: Mapping[str, Any], steps: int) -> int:
    """As Hugging Face's Trainer counts them, where it makes `steps` updates."""
    value = given.get("warmup_steps") or 0
    return _steps(value, steps) or math.ceil(float(given.get("warmup_ratio") or 0) * steps)


def _steps(value: float, steps: int) -> int:
    return math.ceil(value * steps) if value < 1 else int(value)
