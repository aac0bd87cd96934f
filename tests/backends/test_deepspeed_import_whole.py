"""Nothing of an imported config is lost in silence, and what is said of it is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner

from backends.deepspeed.known_keys import KNOWN
from tests.backends.test_deepspeed_import import CONFIGS, FOLDER, import_of, spec_of, translation
from xtrain.cli import main
from xtrain.errors import RequestError
from xtrain.exchange import imports
from xtrain.exchange.translation import Imported, nested, placed
from xtrain.spec.tree import Checkpointing


def said(found: Imported) -> str:
    return "\n".join(imports.notes(found))


# --- the commands ------------------------------------------------------------------------------------


def command(*words: object) -> str:
    done = CliRunner().invoke(main, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_import_and_translate_come_to_a_fixed_point_by_their_commands(path: Path, tmp_path: Path) -> None:
    """Whatever this machine lacks: no drive is mounted where infinity.json has one."""
    spec, config, again = tmp_path / "spec.yaml", tmp_path / "ds_config.json", tmp_path / "again.yaml"
    command("import", path, "--out", spec)
    config.write_text(command("translate", spec))
    command("import", config, "--out", again)
    assert command("translate", again) == config.read_text()


def test_a_drive_that_is_not_here_matters_to_check_and_not_to_translate(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    command("import", FOLDER / "infinity.json", "--out", spec)
    assert json.loads(command("translate", spec))["zero_optimization"]["offload_param"]["device"] == "nvme"
    checked = CliRunner().invoke(main, ["check", str(spec), "--backend", "deepspeed"])
    assert "found /local_nvme, no such folder here" in checked.stderr


# --- every key ---------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {"train_batch_size": 40, "train_micro_batch_size_per_gpu": 2}
DRIVE = {"device": "nvme", "nvme_path": "/drive"}
FULL: dict[str, Any] = {
    **PLAIN,
    "fp16": {"enabled": True},
    "zero_optimization": {"stage": 3, "offload_optimizer": DRIVE, "offload_param": DRIVE},
    "activation_checkpointing": {"number_checkpoints": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
    "torch_autocast": {"enabled": False},
}


def unusual(schema: dict[str, Any]) -> Any:
    """A value that is not the default."""
    schema = schema.get("anyOf", [schema])[0] | {k: v for k, v in schema.items() if k == "default"}
    default = schema.get("default")
    if "enum" in schema:
        return next(word for word in reversed(schema["enum"]) if word != default)
    match schema["type"]:
        case "boolean":
            return not default
        case "integer":
            return max(default or 0, schema.get("minimum", 0)) + 4 if default != 2**63 - 1 else 4
        case "number":
            return 0.5
    return {"string": "word", "array": ["word"], "object": {"enabled": True}}[schema["type"]]


def within(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The config with an unusual value at `key`."""
    changed: dict[str, Any] = json.loads(json.dumps(config))
    placed(changed, {key: unusual(KNOWN[key])})
    return changed


def is_carried(key: str, found: Imported) -> bool:
    spec = spec_of(found)
    value: Any = unusual(KNOWN[key])
    if key == "gradient_clipping":
        return bool(spec.train.clip == value)
    if key in ("tensorboard.enabled", "wandb.enabled"):
        return key.partition(".")[0] in spec.log.trackers
    return any(setting.key == key and setting.value == value for setting in translation(spec))


def lost(config: dict[str, Any], folder: Path) -> Iterator[str]:
    """Known keys that the spec does not have and nobody is told of."""
    for key in KNOWN:
        try:
            found = import_of(folder, within(config, key))
        except RequestError as refused:
            if key not in str(refused):
                yield key
            continue
        if not is_carried(key, found) and key not in said(found):
            yield key


@pytest.mark.parametrize("config", [PLAIN, FULL], ids=["plain", "everything on"])
def test_every_known_key_is_carried_or_told(config: dict[str, Any], tmp_path: Path) -> None:
    assert list(lost(config, tmp_path)) == []


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"wat": False}, "wat: false: unknown to DeepSpeed"),
        ({"zero_optimization.stage": 3}, "'zero_optimization.stage': 3: unknown to DeepSpeed"),
        ({"zero_optimization": {"magic": None}}, "zero_optimization.magic: null: unknown to DeepSpeed"),
        ({"optimizer": {"params": {"lr": 1.0}}}, "optimizer.params: without optimizer.type"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warm": 3}}}, "scheduler.params.warm: 3"),
        ({"fp16": {"enabled": True, "loss_scale": 8, "hysteresis": 3}}, "fp16.hysteresis: 3: no effect"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param.device: 'cpu': no "),
    ],
    ids=str,
)
def test_what_means_nothing_is_listed(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    assert name in "\n".join(import_of(tmp_path, {**PLAIN, **config}).left_out)


def test_a_key_of_a_block_that_is_off_is_listed(tmp_path: Path) -> None:
    found = import_of(tmp_path, {**PLAIN, "fp16": {"enabled": False, "hysteresis": 3}})
    assert list(found.left_out) == ["fp16.hysteresis: 3: fp16 is not enabled"]


def test_what_has_no_effect_at_the_imported_stage_is_listed_with_the_reason(tmp_path: Path) -> None:
    zero = {"stage": 2, "sub_group_size": 5}
    found = import_of(tmp_path, {**PLAIN, "zero_optimization": zero, "aio": {"queue_depth": 3}})
    assert list(found.left_out) == [
        "zero_optimization.sub_group_size: 5: DeepSpeed reads it only at ZeRO stage 3: leave it out, or set "
        "memory.sharding: parameters",
        "aio.queue_depth: 3: DeepSpeed reads it only with something on a drive: leave it out, or set "
        "memory.offload.optimizer: {device: nvme, path: ...}",
    ]


def some_keys_changed(random: Random) -> dict[str, Any]:
    """PLAIN or FULL at some stage, with up to eight keys at an unusual value."""
    config = {**random.choice([PLAIN, FULL]), "gradient_clipping": random.choice([0.0, 1.0])}
    for key in random.sample(sorted(set(KNOWN) - set(PLAIN)), random.randint(1, 8)):
        if not key.endswith(".enabled"):
            config = within(config, key)
    if isinstance(zero := config.get("zero_optimization"), dict):
        zero["stage"] = random.choice([0, 1, 2, 3])
    return config


def test_whatever_is_carried_comes_to_a_fixed_point(tmp_path: Path) -> None:
    random, compared = Random(11), 0
    for _ in range(60):
        try:
            spec = spec_of(import_of(tmp_path, some_keys_changed(random)))
        except RequestError:
            continue
        config = nested(translation(spec))
        assert nested(translation(spec_of(import_of(tmp_path, config)))) == config
        compared += 1
    assert compared > 40


# --- what is said is true ----------------------------------------------------------------------------


def test_more_groups_than_layers_are_a_note_and_a_deeper_model(tmp_path: Path) -> None:
    found = import_of(tmp_path, {**PLAIN, "activation_checkpointing": {"number_checkpoints": 20}})
    assert found.spec["model"]["layers"] == 20
    assert "model.layers: a stand-in: " in said(found)


@pytest.mark.parametrize(
    ("config", "note"),
    [
        (
            {"zero_optimization": {"stage": "auto"}},
            "memory.sharding: zero_optimization.stage was auto, which nobody fills: 0",
        ),
        (
            {"fp16": {"enabled": True, "loss_scale": "auto"}},
            "precision: fp16.loss_scale was auto, which nobody fills: 0",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            "zero_optimization.reduce_bucket_size was auto: xtrain derives it from the model",
        ),
        (
            {"zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": "auto"}},
            "zero_optimization.stage3_prefetch_bucket_size was auto, which nobody fills: 50000000",
        ),
        ({"wat": "auto"}, "not carried: wat: 'auto': unknown to DeepSpeed"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_became_of_an_auto_is_said_truly(config: dict[str, Any], note: str, tmp_path: Path) -> None:
    assert note in said(import_of(tmp_path, {**PLAIN, **config}))


def test_what_the_backend_cannot_run_is_said(tmp_path: Path) -> None:
    found = import_of(tmp_path, {**PLAIN, "torch_autocast": {"enabled": True, "dtype": "float16"}})
    assert "cannot run as it is: precision: found {dtype: fp16, weights: fp32}, " in said(found)


# --- beside TrainingArguments ------------------------------------------------------------------------

ARGUMENTS: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


def test_contradicting_arguments_lose_and_it_is_said(tmp_path: Path) -> None:
    embedded = {**PLAIN, "gradient_clipping": 0.5, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    arguments = {**ARGUMENTS, "max_grad_norm": 2.0, "learning_rate": 1e-4}
    found = import_of(tmp_path, {**arguments, "deepspeed": embedded})
    spec = spec_of(found)
    assert (spec.train.clip, spec.optimizer.lr) == (0.5, 1e-3)
    loses = "was taken; Hugging Face's Trainer refuses such a pair"
    assert f"max_grad_norm: 2.0: gradient_clipping of the ds_config, 0.5, {loses}" in found.left_out
    assert f"learning_rate: 0.0001: optimizer.params.lr of the ds_config, 0.001, {loses}" in found.left_out


def test_agreeing_arguments_are_no_contradiction(tmp_path: Path) -> None:
    embedded = {**PLAIN, "gradient_accumulation_steps": 4, "gradient_clipping": 1.0}
    found = import_of(tmp_path, {**ARGUMENTS, "deepspeed": embedded})
    assert list(found.left_out) == []


def test_the_arguments_add_batch_and_precision_where_the_ds_config_has_none(tmp_path: Path) -> None:
    embedded = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    found = import_of(tmp_path, {**ARGUMENTS, "bf16": True, "deepspeed": embedded})
    assert found.chosen["precision"] == "bf16.enabled is not there: true, bf16"
    spec = spec_of(found)
    assert (spec.batch.global_, spec.batch.micro) == (8, 2)
    assert (spec.precision.dtype, spec.precision.weights) == ("bf16", "bf16")
    assert spec.train.clip == 1.0


def test_a_ds_config_that_clips_nothing_is_said_beside_arguments(tmp_path: Path) -> None:
    found = import_of(tmp_path, {**ARGUMENTS, "deepspeed": PLAIN})
    assert spec_of(found).train.clip is None
    why = "DeepSpeed clips nothing, as the ds_config has no gradient_clipping"
    assert f"max_grad_norm: 1.0: {why}" in found.left_out


def test_how_often_to_log_is_said_by_the_arguments_where_there_are_any(tmp_path: Path) -> None:
    embedded = {**PLAIN, "gradient_clipping": 1.0, "steps_per_print": 2000}
    assert spec_of(import_of(tmp_path, embedded)).log.every_steps == 2000
    found = import_of(tmp_path, {**ARGUMENTS, "logging_steps": 5, "deepspeed": embedded})
    assert spec_of(found).log.every_steps == 5
    assert "steps_per_print: 2000: how often to log is said by logging_steps" in found.left_out


def test_another_kind_of_optimizer_takes_nothing_from_the_arguments_but_the_rate(tmp_path: Path) -> None:
    embedded = {**PLAIN, "optimizer": {"type": "SGD", "params": {"momentum": 0.9}}}
    found = import_of(tmp_path, {**ARGUMENTS, "learning_rate": 1e-3, "deepspeed": embedded})
    assert found.spec["optimizer"] == {"name": "sgd", "lr": 1e-3, "momentum": 0.9}


def test_arguments_of_a_wrong_kind_are_refused_beside_a_config_too(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="max_steps: found 'many'"):
        import_of(tmp_path, {**PLAIN, "gradient_clipping": "auto"}, {"max_steps": "many"})


@pytest.mark.parametrize(
    ("floor", "ratio"), [({"min_lr": 1e-4}, 0.1), ({"min_lr_rate": 0.25}, 0.25)], ids=["rate", "share"]
)
def test_the_least_learning_rate_is_carried(floor: dict[str, float], ratio: float, tmp_path: Path) -> None:
    kind = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": floor, "learning_rate": 1e-3}
    found = import_of(tmp_path, {**ARGUMENTS, **kind, "max_steps": 10})
    assert found.spec["schedule"] == {"name": "cosine", "warmup": 0, "min_ratio": ratio, "cycles": 0.5}
    assert list(found.left_out) == []


def test_a_least_learning_rate_that_is_missing_is_told(tmp_path: Path) -> None:
    found = import_of(tmp_path, {**ARGUMENTS, "lr_scheduler_type": "cosine_with_min_lr"})
    assert any(line.startswith("lr_scheduler_type: 'cosine_with_min_lr'") for line in found.left_out)


@pytest.mark.parametrize("key", ["save_strategy", "eval_strategy"])
def test_a_strategy_by_epochs_is_told(key: str, tmp_path: Path) -> None:
    found = import_of(tmp_path, {**ARGUMENTS, key: "epoch"})
    assert any(line.startswith(f"{key}: 'epoch'") for line in found.left_out)


def test_steps_below_one_are_shares_of_the_run(tmp_path: Path) -> None:
    shares = {"max_steps": 200, "save_steps": 0.1, "logging_steps": 0.05}
    spec = spec_of(import_of(tmp_path, {**ARGUMENTS, **shares}))
    assert (spec.checkpoint.every_steps, spec.log.every_steps) == (20, 10)


def test_checkpointing_of_the_arguments_stays_beside_a_ds_config(tmp_path: Path) -> None:
    found = import_of(tmp_path, {**ARGUMENTS, "gradient_checkpointing": True, "deepspeed": PLAIN})
    memory = spec_of(found).memory
    assert memory != "auto"
    assert memory.checkpointing == Checkpointing(every=1)


BEST: dict[str, Any] = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 50}


def test_the_best_by_its_loss_is_kept(tmp_path: Path) -> None:
    named = {"metric_for_best_model": "eval_loss", "greater_is_better": False}
    for arguments in (BEST, {**BEST, **named}):
        found = import_of(tmp_path, {**ARGUMENTS, **arguments})
        assert spec_of(found).checkpoint.best
        assert "a run ends with its last weights" in found.chosen["checkpoint.best"]
        assert list(found.left_out) == []


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"metric_for_best_model": "eval_accuracy"}, "by the greatest 'eval_accuracy'"),
        ({"greater_is_better": True}, "by the greatest 'loss'"),
        ({"metric_for_best_model": "their_loss"}, "by the least 'their_loss'"),
        ({"eval_strategy": "epoch"}, "the spec that was written evaluates nothing"),
    ],
)
def test_a_best_that_is_not_ours_is_told(other: dict[str, Any], why: str, tmp_path: Path) -> None:
    found = import_of(tmp_path, {**ARGUMENTS, **BEST, **other})
    assert not spec_of(found).checkpoint.best
    assert any(line.startswith(f"load_best_model_at_end: {why}") for line in found.left_out)
