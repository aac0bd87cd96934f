"""The table spec <-> ds_config is whole, says what the translation does, and stands in the documentation."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from backends.deepspeed.mapping import MAPPING, table
from tests.backends.test_every_key import SET, changed
from xtrain.exchange.translate import find_translator
from xtrain.exchange.translation import Setting
from xtrain.spec.keys import all_keys, covering

PAGE = Path(__file__).parents[2] / "docs" / "deepspeed.md"


def nearest_row(key: str) -> str | None:
    """The row that `key` has, or the one of the section that it is in."""
    while key and key not in MAPPING:
        key = key.rpartition(".")[0]
    return key or None


@cache
def said() -> set[tuple[str, str]]:
    """(spec key, ds_config key) for every setting of specs that together set every key."""
    translator = find_translator(None)
    found: list[Setting] = []
    for key in SET:
        spec = changed(key)
        world = spec.launch.processes
        found += [*translator.translation(spec, world), *translator.standalone(spec, world)]
    pairs = {(spec_key, setting.key) for setting in found for spec_key in setting.spec_keys}
    return {(s, k) for s, k in pairs if not s.startswith("deepspeed.")}


def related(spec_key: str, row: str) -> bool:
    """Whether one is the other, or a section that the other is in."""
    return bool(covering(spec_key, [row]) or covering(row, [spec_key]))


@pytest.mark.parametrize("key", all_keys())
def test_every_key_of_the_spec_is_in_the_table(key: str) -> None:
    assert nearest_row(key) is not None


def test_no_row_is_about_a_key_that_does_not_exist() -> None:
    keys = all_keys()
    assert [row for row in MAPPING if not any(covering(key, [row]) for key in keys)] == []


def test_what_the_translation_says_is_in_the_table() -> None:
    for spec_key, ds_key in said():
        rows = [keys for row, (keys, _) in MAPPING.items() if related(spec_key, row)]
        assert ds_key in {key.strip("[]") for keys in rows for key in keys}, (spec_key, ds_key)


def test_what_is_in_the_table_the_translation_says() -> None:
    for row, (keys, _) in MAPPING.items():
        for ds_key in (key.strip("[]") for key in keys if " " not in key):
            assert any(key == ds_key and related(spec_key, row) for spec_key, key in said()), (row, ds_key)


def test_the_table_of_the_documentation_is_current() -> None:
    """When it is not: print backends.deepspeed.mapping.table() and put it below the comment."""
    assert table() in PAGE.read_text()


ZERO = "zero_optimization"
KNOBS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "communication_data_type",
    "bf16.enabled",
    *(f"torch_autocast.{key}" for key in ("enabled", "dtype", "lower_precision_safe_modules")),
    *(f"fp16.{key}" for key in ("enabled", "auto_cast", "loss_scale", "initial_scale_power")),
    *(f"fp16.{key}" for key in ("loss_scale_window", "hysteresis", "min_loss_scale")),
    *(f"activation_checkpointing.{key}" for key in ("partition_activations", "cpu_checkpointing")),
    *(f"activation_checkpointing.{key}" for key in ("contiguous_memory_optimization", "number_checkpoints")),
    *(f"activation_checkpointing.{key}" for key in ("synchronize_checkpoint_boundary", "profile")),
    *(f"{ZERO}.{key}" for key in ("stage", "overlap_comm", "contiguous_gradients", "sub_group_size")),
    *(f"{ZERO}.{key}" for key in ("reduce_bucket_size", "allgather_bucket_size")),
    *(f"{ZERO}.offload_optimizer.{key}" for key in ("device", "nvme_path", "pin_memory")),
    *(f"{ZERO}.offload_param.{key}" for key in ("device", "nvme_path", "pin_memory")),
    *(f"{ZERO}.stage3_{key}" for key in ("prefetch_bucket_size", "param_persistence_threshold")),
    *(f"{ZERO}.stage3_{key}" for key in ("max_live_parameters", "max_reuse_distance")),
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save",
    *(f"aio.{key}" for key in ("block_size", "queue_depth", "intra_op_parallelism", "single_submit")),
    "aio.overlap_events",
    "optimizer.type",
    *(f"optimizer.params.{key}" for key in ("lr", "betas", "eps", "weight_decay")),
    "scheduler.type",
    *(f"scheduler.params.{key}" for key in ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps")),
    "scheduler.params.total_num_steps",
    "steps_per_print",
    "wall_clock_breakdown",
)
"""What people set in a ds_config."""


@cache
def written() -> set[str]:
    """Every key of a ds_config that the specs of `SET` become, with and without xtrain around it."""
    translator = find_translator(None)
    keys: set[str] = set()
    for key in SET:
        spec = changed(key)
        world = spec.launch.processes
        settings = [*translator.translation(spec, world), *translator.standalone(spec, world)]
        keys |= {setting.key for setting in settings}
    return keys


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_that_people_know_is_written_from_some_spec(knob: str) -> None:
    assert knob in written()
