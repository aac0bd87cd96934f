"""ds_configs as people write them become specs, and those the same ds_config again."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from backends.deepspeed.known_keys import KNOWN
from backends.deepspeed.overrides import leaves
from xtrain.contract import JSON
from xtrain.errors import RequestError
from xtrain.exchange import imports
from xtrain.exchange.translate import find_translator
from xtrain.exchange.translation import Imported, Setting, nested
from xtrain.spec.check import check_spec
from xtrain.spec.tree import Spec

FOLDER = Path(__file__).parent / "ds_configs"
CONFIGS = sorted(FOLDER.glob("*.json"))
DS_CONFIGS = [path for path in CONFIGS if not path.stem.startswith("training-arguments")]
SAID_OTHERWISE = {"optimizer.params": "optimizer", "scheduler.params": "schedule", "steps_per_print": "log"}
"""Keys that are held against the spec in tests of their own."""


def imported(path: Path, **options: Any) -> Imported:
    return imports.import_file(path, options.get("arguments"), options.get("world"), None)


def spec_of(found: Imported) -> Spec:
    return Spec.model_validate(found.spec)


def translation(spec: Spec) -> list[Setting]:
    return find_translator(None).translation(spec, spec.launch.processes)


def reimported(settings: list[Setting], spec: Spec, folder: Path) -> Spec:
    """The spec from the config that was made from `spec`."""
    again = folder / "again.json"
    again.write_text(json.dumps(nested(settings)))
    return spec_of(imported(again, world=spec.launch.processes))


def test_configs_were_found() -> None:
    assert len(CONFIGS) >= 10


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_becomes_a_sound_spec(path: Path) -> None:
    assert check_spec(spec_of(imported(path))) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_to_spec_to_config_is_a_fixed_point(path: Path, tmp_path: Path) -> None:
    spec = spec_of(imported(path))
    settings = translation(spec)
    again = reimported(settings, spec, tmp_path)
    assert nested(translation(again)) == nested(settings)


def carried_alone(path: Path) -> bool:
    return not find_translator(None).standalone_problems(spec_of(imported(path)), 1)


ALONE = [path for path in CONFIGS if carried_alone(path)]


def test_most_configs_can_stand_alone() -> None:
    assert len(ALONE) >= 6


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_standalone_config_to_spec_to_config_is_a_fixed_point(path: Path, tmp_path: Path) -> None:
    spec, translator = spec_of(imported(path)), find_translator(None)
    settings = translator.standalone(spec, spec.launch.processes)
    again = reimported(settings, spec, tmp_path)
    assert nested(translator.standalone(again, again.launch.processes)) == nested(settings)


@pytest.mark.parametrize("path", DS_CONFIGS, ids=lambda path: path.stem)
def test_every_value_comes_back_or_is_accounted_for(path: Path) -> None:
    found = imported(path)
    spec = spec_of(found)
    back: dict[str, JSON] = {setting.key: setting.value for setting in translation(spec)}
    back["gradient_clipping"] = spec.train.clip or 0.0
    told = "\n".join(imports.notes(found))
    unexplained = {
        key: value
        for key, value in leaves(json.loads(path.read_text()))
        if back.get(key, KNOWN.get(key, {}).get("default", False)) != value
        and key not in told
        and key not in SAID_OTHERWISE
        and value not in ("auto", {})
    }
    assert {key for key in unexplained if not accounted_for(key, spec)} == set()


def accounted_for(key: str, spec: Spec) -> bool:
    """What the spec says in other words."""
    block, _, name = key.rpartition(".")
    if block == "fp16":  # the scaler of another precision, or of a fixed scale
        return spec.precision.dtype != "fp16" or bool(spec.precision.loss_scale)
    return (block, name) in {
        ("optimizer", "type"),
        ("scheduler", "type"),
        ("tensorboard", "enabled"),
        ("zero_optimization", "cpu_offload"),
        ("torch_autocast", "lower_precision_safe_modules"),
    }


def test_what_is_not_carried_is_listed() -> None:
    left_out = "\n".join(imported(FOLDER / "old-forms.json").left_out)
    for word in ("OneBitAdam", "freeze_step", "OneCycle", "gradient_cliping"):
        assert word in left_out


def test_auto_takes_the_training_arguments(tmp_path: Path) -> None:
    arguments = tmp_path / "arguments.json"
    values = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-4,
        "bf16": True,
        "max_grad_norm": 0.5,
        "max_steps": 700,
        "warmup_steps": 70,
    }
    arguments.write_text(json.dumps(values))
    found = imported(FOLDER / "zero3-auto.json", arguments=arguments, world=2)
    spec = spec_of(found)
    assert (spec.batch.global_, spec.batch.micro, spec.launch.processes) == (16, 4, 2)
    assert (spec.train.steps, spec.train.clip, spec.optimizer.lr) == (700, 0.5, 3e-4)
    assert (spec.schedule.name, spec.schedule.warmup) == ("warmup-decay", 70)
    assert spec.precision.weights == "bf16"
    assert found.chosen["optimizer.lr"].endswith("was auto: 0.0003, learning_rate")


def test_auto_without_arguments_states_their_defaults() -> None:
    found = imported(FOLDER / "zero2-auto.json")
    assert found.chosen["train.clip"] == "gradient_clipping was auto: 1.0, the default of max_grad_norm"
    assert spec_of(found).optimizer.lr == 5e-5


def test_training_arguments_become_a_spec() -> None:
    spec = spec_of(imported(FOLDER / "training-arguments.json", world=4))
    assert (spec.batch.global_, spec.batch.micro, spec.launch.processes) == (128, 4, 4)
    assert (spec.train.steps, spec.train.clip, spec.train.eval_every) == (1200, 0.5, 100)
    assert (spec.schedule.name, spec.schedule.warmup) == ("cosine", 60)
    assert spec.memory != "auto"
    assert spec.memory.checkpointing.every == 1
    assert (spec.checkpoint.every_steps, spec.checkpoint.keep) == (300, 2)


def test_the_schedule_of_the_arguments_stays_where_the_ds_config_has_none() -> None:
    spec = spec_of(imported(FOLDER / "training-arguments-deepspeed.json"))
    assert (spec.schedule.name, spec.schedule.warmup) == ("linear", 50)


def test_all_three_batch_keys_tell_the_number_of_processes() -> None:
    assert spec_of(imported(FOLDER / "zero2-bf16.json")).launch.processes == 8


JUNK: list[Any] = [None, True, -1, 0, 0.5, 1e30, "", "x", "auto", [], [1], {}, {"a": 1}, {"enabled": True}]


def spoiled(tree: Any, random: Random) -> Any:
    """The tree with one value, or one section, replaced."""
    if not isinstance(tree, dict) or not tree or random.random() < 0.2:
        return random.choice(JUNK)
    key = random.choice(sorted(tree))
    return {**tree, key: spoiled(tree[key], random)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_spoiled_config_is_imported_or_refused(path: Path, tmp_path: Path) -> None:
    whole, random, refused = json.loads(path.read_text()), Random(7), 0
    for number in range(40):
        spoilt = tmp_path / f"{number}.json"
        spoilt.write_text(json.dumps(spoiled(whole, random)))
        try:
            imported(spoilt)
        except RequestError:
            refused += 1
    assert 0 < refused < 40


def import_of(tmp_path: Path, config: Any, arguments: Any = None) -> Imported:
    path, filled = tmp_path / "config.json", tmp_path / "arguments.json"
    path.write_text(json.dumps(config))
    filled.write_text(json.dumps(arguments))
    return imports.import_file(path, filled if arguments else None, None, None)


def test_an_automatic_warmup_is_the_arguments_share(tmp_path: Path) -> None:
    params = {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_max_lr": "auto"}
    config = {"train_batch_size": 4, "scheduler": {"type": "WarmupDecayLR", "params": params}}
    found = import_of(tmp_path, config, {"max_steps": 90, "warmup_ratio": 0.25, "learning_rate": 1e-3})
    assert spec_of(found).schedule.warmup == 23


def test_a_share_of_updates_that_nobody_counted_is_one_of_the_stand_in_and_said_so(tmp_path: Path) -> None:
    params = {"warmup_num_steps": "auto", "total_num_steps": "auto", "warmup_max_lr": "auto"}
    config = {"train_batch_size": 4, "scheduler": {"type": "WarmupDecayLR", "params": params}}
    for whole in ({}, config):
        arguments = {"num_train_epochs": 3, "warmup_ratio": 0.03, "lr_scheduler_type": "linear"}
        found = import_of(tmp_path, whole or arguments, arguments if whole else None)
        assert (spec_of(found).train.steps, spec_of(found).schedule.warmup) == (1000, 30)
        assert any("warmup_ratio is a share of it" in line for line in imports.notes(found))


def test_evaluations_are_those_of_the_strategy_by_its_old_name_too(tmp_path: Path) -> None:
    arguments = {"per_device_train_batch_size": 4, "evaluation_strategy": "steps", "eval_steps": 50}
    assert spec_of(import_of(tmp_path, arguments)).train.eval_every == 50


def test_null_where_deepspeed_has_no_default_says_nothing(tmp_path: Path) -> None:
    """As in the examples of its documentation, and in what programs write out whole."""
    nulls = {"gradient_accumulation_steps": None, "communication_data_type": None, "optimizer": None}
    block = {"activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}}
    plain = {"train_batch_size": 8}
    assert import_of(tmp_path, {**plain, **nulls, **block}) == import_of(tmp_path, plain)


def test_two_precisions_are_refused(tmp_path: Path) -> None:
    both = {"train_batch_size": 8, "fp16": {"enabled": True}, "bf16": {"enabled": True}}
    with pytest.raises(RequestError, match="expected one precision"):
        import_of(tmp_path, both)
    with pytest.raises(RequestError, match="expected at most one of them"):
        import_of(tmp_path, {"per_device_train_batch_size": 4, "bf16": True, "fp16": True})


def test_what_an_optimizer_does_unusually_is_named(tmp_path: Path) -> None:
    params = {"lr": 1e-3, "amsgrad": True, "bias_correction": True}
    found = import_of(tmp_path, {"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": params}})
    named = [line for line in found.left_out if line.startswith("optimizer.params.")]
    assert len(named) == 1
    assert "amsgrad" in named[0]


@pytest.mark.parametrize("given", [{"num_cycles": "x"}, {"num_cycles": None}, "no JSON", {"min_lr": 1e-5}])
def test_scheduler_arguments_that_are_not_understood_are_named_or_left(tmp_path: Path, given: JSON) -> None:
    arguments: Any = {"per_device_train_batch_size": 4, "lr_scheduler_type": "cosine", "max_steps": 10}
    found = import_of(tmp_path, {**arguments, "lr_scheduler_kwargs": given})
    assert spec_of(found).schedule.cycles == 0.5  # type: ignore[union-attr]
    told = any(line.startswith("lr_scheduler_kwargs") for line in found.left_out)
    assert told is (given != {"num_cycles": None})


def test_scheduler_arguments_may_be_text(tmp_path: Path) -> None:
    arguments: Any = {"per_device_train_batch_size": 4, "lr_scheduler_type": "cosine", "max_steps": 10}
    found = import_of(tmp_path, {**arguments, "lr_scheduler_kwargs": '{"num_cycles": 2}'})
    assert spec_of(found).schedule.cycles == 2.0  # type: ignore[union-attr]
