"""Every key of a spec is honoured or refused by name, on every backend: none is silently ignored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xtrain import registry
from xtrain.contract import Problem
from xtrain.spec.check import check_spec
from xtrain.spec.keys import all_keys, changed_keys
from xtrain.spec.tree import Spec

BASE: dict[str, Any] = {
    "model": {"preset": "gpt2-nano"},
    "data": {"source": "stdlib"},
    "batch": {"global": 16, "micro": 8},
    "train": {"steps": 200},
    "optimizer": {"lr": 1e-3},
}
FACTORY = {"preset": None, "factory": "models.tiny:build"}
SYNTHETIC = {"source": "synthetic"}
FP16 = {"dtype": "fp16"}
WSD = {"name": "wsd", "stable": 100, "decay": 50}
NVME = {"device": "nvme", "path": str(Path(__file__).parent)}
SHARDED = {"sharding": "parameters"}

SET: dict[str, dict[str, Any]] = {
    "model.preset": {"model": {"preset": "gpt2"}},
    "model.factory": {"model": FACTORY},
    "model.args": {"model": {**FACTORY, "args": {"width": 8}}},
    "model.hf": {"model": {"preset": None, "hf": "distilgpt2"}},
    "model.trust_remote_code": {"model": {"preset": None, "hf": "distilgpt2", "trust_remote_code": True}},
    "model.layers": {"model": {"layers": 2}},
    "model.hidden": {"model": {"hidden": 64}},
    "model.heads": {"model": {"heads": 2}},
    "model.positions": {"model": {"positions": 256}},
    "model.vocab_size": {"model": {"vocab_size": 300}},
    "model.dropout": {"model": {"dropout": 0.1}},
    "model.blocks": {"model": {**FACTORY, "blocks": "layers"}},
    "model.init_from": {"model": {"init_from": "."}},
    "data.source": {"data": {"source": "synthetic"}},
    "data.path": {"data": {"source": "text", "path": __file__}},
    "data.tokenizer": {"data": {"tokenizer": "gpt2"}},
    "data.seq_len": {"data": {"seq_len": 64}},
    "data.held_out": {"data": {"held_out": 0.1}},
    "data.masked": {"data": {**SYNTHETIC, "masked": 0.3}},
    "data.tokens": {"data": {**SYNTHETIC, "tokens": 100_000}},
    "batch.global": {"batch": {"global": 32}},
    "batch.micro": {"batch": {"micro": 4}},
    "train.steps": {"train": {"steps": 300}},
    "train.seed": {"train": {"seed": 1}},
    "train.clip": {"train": {"clip": None}},
    "train.eval_every": {"train": {"eval_every": 50}},
    "train.compile": {"train": {"compile": True}},
    "optimizer.name": {"optimizer": {"name": "sgd"}},
    "optimizer.lr": {"optimizer": {"lr": 0.1}},
    "optimizer.betas": {"optimizer": {"betas": (0.8, 0.9)}},
    "optimizer.eps": {"optimizer": {"eps": 1e-6}},
    "optimizer.weight_decay": {"optimizer": {"weight_decay": 0.0}},
    "optimizer.momentum": {"optimizer": {"name": "sgd", "momentum": 0.9}},
    "schedule.name": {"schedule": {"name": "linear"}},
    "schedule.warmup": {"schedule": {"warmup": 10}},
    "schedule.min_ratio": {"schedule": {"min_ratio": 0.5}},
    "schedule.cycles": {"schedule": {"cycles": 1.5}},
    "schedule.stable": {"schedule": WSD},
    "schedule.decay": {"schedule": WSD},
    "schedule.warmup_type": {"schedule": {"name": "warmup-decay", "warmup": 10, "warmup_type": "linear"}},
    "precision.dtype": {"precision": {"dtype": "bf16"}},
    "precision.weights": {"precision": {"dtype": "bf16", "weights": "bf16"}},
    "precision.loss_scale": {"precision": {**FP16, "loss_scale": 128.0}},
    "precision.initial_scale_power": {"precision": {**FP16, "initial_scale_power": 8}},
    "precision.loss_scale_window": {"precision": {**FP16, "loss_scale_window": 50}},
    "precision.hysteresis": {"precision": {**FP16, "hysteresis": 1}},
    "precision.min_loss_scale": {"precision": {**FP16, "min_loss_scale": 2.0}},
    "memory.checkpointing.auto": {"memory": {"checkpointing": {"auto": True}}},
    "memory.checkpointing.every": {"memory": {"checkpointing": {"every": 2}}},
    "memory.checkpointing.number": {"memory": {"checkpointing": {"number": 2}}},
    "memory.checkpointing.selective.ratio": {"memory": {"checkpointing": {"selective": {"ratio": 0.5}}}},
    "memory.checkpointing.selective.ops": {"memory": {"checkpointing": {"selective": {"ops": "cheap"}}}},
    "memory.sharding": {"memory": {"sharding": "gradients"}},
    "memory.offload.optimizer.device": {"memory": {**SHARDED, "offload": {"optimizer": "cpu"}}},
    "memory.offload.optimizer.path": {"memory": {**SHARDED, "offload": {"optimizer": NVME}}},
    "memory.offload.gradients.device": {
        "memory": {**SHARDED, "offload": {"optimizer": "cpu", "gradients": "cpu"}}
    },
    "memory.offload.gradients.path": {
        "memory": {**SHARDED, "offload": {"optimizer": NVME, "gradients": NVME}}
    },
    "memory.offload.parameters.device": {"memory": {**SHARDED, "offload": {"parameters": "cpu"}}},
    "memory.offload.parameters.path": {"memory": {**SHARDED, "offload": {"parameters": NVME}}},
    "memory.offload.activations.device": {"memory": {"offload": {"activations": "cpu"}}},
    "memory.offload.activations.path": {"memory": {"offload": {"activations": NVME}}},
    "memory.loss_chunk": {"memory": {"loss_chunk": 64}},
    "memory.optimizer_in_backward": {
        "memory": {"optimizer_in_backward": True},
        "train": {"clip": None},
        "batch": {"micro": 16},
    },
    "launch.processes": {"launch": {"processes": 2}},
    "launch.hang_minutes": {"launch": {"hang_minutes": 5.0}},
    "launch.grace_seconds": {"launch": {"grace_seconds": 90.0}},
    "checkpoint.every_steps": {"checkpoint": {"every_steps": 50}},
    "checkpoint.every_minutes": {"checkpoint": {"every_minutes": 5.0}},
    "checkpoint.keep": {"checkpoint": {"keep": 1}},
    "checkpoint.best": {"checkpoint": {"best": True}, "train": {"eval_every": 50}},
    "checkpoint.background": {"checkpoint": {"background": True}},
    "checkpoint.on_error": {"checkpoint": {"on_error": "stop"}},
    "stability.loss_spike": {"stability": {"loss_spike": 3.0}},
    "stability.window": {"stability": {"loss_spike": 3.0, "window": 20}},
    "stability.grad_norm": {"stability": {"grad_norm": 5.0}},
    "stability.stop_after": {"stability": {"grad_norm": 5.0, "stop_after": 3}},
    "log.every_steps": {"log": {"every_steps": 1}},
    "log.trackers": {"log": {"trackers": ["tensorboard"]}},
    "deepspeed": {
        "memory": {"sharding": "gradients"},
        "deepspeed": {"zero_optimization": {"overlap_comm": False}},
    },
    "manual.devices": {"manual": {"devices": ["main", "cpu"]}},
    "manual.split": {"manual": {"devices": ["main", "cpu"], "split": [1, 3]}},
}
"""Each key, and what to change in the base spec so that it has a value that is not its default."""

EVERYWHERE = {
    "model.preset": "model",
    "model.factory": "model",
    "model.args": "model",
    "model.hf": "model",
    "model.trust_remote_code": "model",
    "model.init_from": "model",
    "model.layers": "model",
    "model.hidden": "model",
    "model.heads": "model",
    "model.positions": "model",
    "model.vocab_size": "model",
    "model.dropout": "model",
    "data.source": "data",
    "data.path": "data",
    "data.tokenizer": "data",
    "data.seq_len": "data",
    "data.held_out": "data",
    "data.masked": "data",
    "data.tokens": "data",
    "batch.global": "data",
    "batch.micro": "data",
    "train.steps": "loop",
    "train.seed": "data",  # and model, and the engine's random states
    "train.clip": "engine",
    "train.eval_every": "loop",
    "train.compile": "engine",
    "optimizer.name": "engine",
    "optimizer.lr": "schedule",
    "optimizer.betas": "engine",
    "optimizer.eps": "engine",
    "optimizer.weight_decay": "engine",
    "optimizer.momentum": "engine",
    "schedule.name": "schedule",
    "schedule.warmup": "schedule",
    "schedule.min_ratio": "schedule",
    "schedule.cycles": "schedule",
    "schedule.stable": "schedule",
    "schedule.decay": "schedule",
    "schedule.warmup_type": "schedule",
    "precision.dtype": "engine",
    "precision.weights": "engine",
    "precision.loss_scale": "engine",
    "precision.initial_scale_power": "engine",
    "precision.loss_scale_window": "engine",
    "precision.hysteresis": "engine",
    "precision.min_loss_scale": "engine",
    "memory.loss_chunk": "model",
    "memory.checkpointing.auto": "engine",
    "memory.checkpointing.every": "engine",
    "memory.checkpointing.number": "engine",
    "memory.checkpointing.selective.ratio": "engine",
    "memory.checkpointing.selective.ops": "engine",
    "model.blocks": "noted",  # and used, where blocks are recomputed
    "checkpoint.every_steps": "checkpointer",
    "checkpoint.every_minutes": "checkpointer",
    "checkpoint.keep": "checkpointer",
    "checkpoint.best": "checkpointer",
    "checkpoint.background": "checkpointer",
    "checkpoint.on_error": "checkpointer",
    "stability.loss_spike": "guards",
    "stability.window": "guards",
    "stability.grad_norm": "guards",
    "stability.stop_after": "guards",
    "launch.hang_minutes": "watchdog",
    "launch.grace_seconds": "watchdog",
    "log.every_steps": "loop",
    "log.trackers": "trackers",
}
RECOMPUTING = [key for key in SET if key.startswith("memory.checkpointing.")]
HONOURED = {
    "cpu": {
        **EVERYWHERE,
        "memory.sharding": "noted",
        "model.blocks": "noted",  # and used, where blocks are recomputed or on several devices
        **dict.fromkeys(RECOMPUTING, "engine"),
        "memory.offload.optimizer.device": "noted",
        "memory.offload.gradients.device": "noted",
        "memory.offload.activations.device": "noted",
        "memory.optimizer_in_backward": "engine",
        "manual.devices": "engine",
        "manual.split": "engine",
        "deepspeed": "noted",
    },
    "deepspeed": {
        **EVERYWHERE,
        "memory.sharding": "ds_config",
        "memory.offload.optimizer.device": "ds_config",
        "memory.offload.optimizer.path": "ds_config",
        "memory.offload.gradients.device": "ds_config",  # with the optimizer
        "memory.offload.gradients.path": "ds_config",
        "memory.offload.parameters.device": "ds_config",
        "memory.offload.parameters.path": "ds_config",
        "memory.offload.activations.device": "engine",
        "deepspeed": "ds_config",
        "launch.processes": "launcher",
        "manual.devices": "noted",
        "manual.split": "noted",
    },
}
"""Who honours a key. `noted`: there is nothing to do here, and a note in resolved.json says so."""


def changed(key: str) -> Spec:
    """A valid spec in which `key` has a value of its own."""
    tree = {**BASE, **{name: {**BASE.get(name, {}), **value} for name, value in SET[key].items()}}
    spec = Spec.model_validate(tree)
    assert key in changed_keys(spec)
    assert check_spec(spec) == []
    return spec


def names(problem: Problem, key: str) -> bool:
    """Whether the problem is about `key`, or about a section that it is in."""
    return key == problem.path or key.startswith(f"{problem.path}.")


def test_every_key_is_set_by_one_case() -> None:
    assert sorted(SET) == all_keys()


@pytest.mark.parametrize("key", SET)
@pytest.mark.parametrize("backend", HONOURED)
def test_key_is_either_honoured_or_refused_by_name(
    backend: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTRAIN_EMULATED_FP16", "1")  # what this processor lacks is not asked
    spec = changed(key)
    problems = registry.load(backend).problems(spec, spec.launch.processes)
    problems = [problem for problem in problems if "libaio" not in problem.expected]  # this machine's affair
    refused = [problem for problem in problems if names(problem, key)]
    assert bool(refused) != (key in HONOURED[backend])
    assert all(problem.nearest for problem in refused)


NOTED = [(backend, key) for backend, table in HONOURED.items() for key in table if table[key] == "noted"]


@pytest.mark.parametrize(("backend", "key"), NOTED)
def test_key_that_means_nothing_here_is_noted(backend: str, key: str) -> None:
    notes = registry.load(backend).resolve(changed(key), 1).notes
    assert any(key.partition(".")[0] in note for note in notes)
