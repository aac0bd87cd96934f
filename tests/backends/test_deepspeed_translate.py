"""spec -> ds_config: concrete, deterministic, light, and taken by DeepSpeed's own parser."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.small_specs import make_spec
from xtrain import registry
from xtrain.exchange.imports import import_file
from xtrain.exchange.translate import find_translator
from xtrain.exchange.translation import nested
from xtrain.spec import Spec, load_spec

SHARDING = ("none", "optimizer", "gradients", "parameters")
BACKEND = registry.load("deepspeed")
ROOT = Path(__file__).parents[2]

PARSE = """
import json, sys
from types import SimpleNamespace
from deepspeed import comm
from deepspeed.runtime.config import DeepSpeedConfig
comm.get_rank = lambda: 0  # without a job the parser takes any world for 1; the mpu tells it which
for world, config in json.load(sys.stdin):
    parsed = DeepSpeedConfig(config, mpu=SimpleNamespace(get_data_parallel_world_size=lambda: world))
    stage, accumulation = parsed.zero_config.stage, parsed.gradient_accumulation_steps
    print(json.dumps([stage, accumulation, parsed.gradient_clipping]))
"""


def translated(world: int = 1, **sections: Any) -> dict[str, Any]:
    spec = make_spec(**sections)
    return cast(dict[str, Any], BACKEND.resolve(spec, world).settings["ds_config"])


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from leaves(inner)
    else:
        yield value


@pytest.mark.parametrize(("stage", "sharding"), enumerate(SHARDING))
def test_sharding_chooses_the_zero_stage(stage: int, sharding: str) -> None:
    assert translated(memory={"sharding": sharding})["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_the_batch_is_split_over_processes_and_accumulation(world: int, accumulation: int) -> None:
    config = translated(world)
    assert config["train_batch_size"] == 8
    assert config["train_micro_batch_size_per_gpu"] == 2
    assert config["gradient_accumulation_steps"] == accumulation


def test_fp32_has_no_block_of_another_precision() -> None:
    assert not {"bf16", "fp16", "torch_autocast"} & translated().keys()


def test_bf16_is_autocast_with_gradients_reduced_in_fp32() -> None:
    config = translated(precision="bf16")
    assert config["torch_autocast"] == {
        "enabled": True,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],
    }
    assert not {"bf16", "fp16"} & config.keys()


@pytest.mark.parametrize("sharding", SHARDING)
def test_nothing_patches_torch_or_changes_the_optimizer(sharding: str) -> None:
    config = translated(memory={"sharding": sharding})
    assert config["zero_optimization"]["memory_efficient_linear"] is False
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert config["zero_allow_untested_optimizer"] is True
    assert not {"optimizer", "scheduler"} & config.keys()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("sharding", SHARDING[1:])
def test_clipping_is_the_specs_where_gradients_are_sharded(sharding: str, clip: float | None) -> None:
    config = translated(memory={"sharding": sharding}, train={"steps": 1, "clip": clip})
    assert config["gradient_clipping"] == (clip or 0.0)


def test_every_value_is_concrete_and_the_same_every_time() -> None:
    for sharding, precision in itertools.product(SHARDING, ("fp32", "bf16")):
        config = translated(2, memory={"sharding": sharding}, precision=precision)
        assert "auto" not in list(leaves(config))
        again = translated(2, memory={"sharding": sharding}, precision=precision)
        assert json.dumps(config) == json.dumps(again)


def test_the_ds_config_is_left_in_the_run_directory() -> None:
    resolved = BACKEND.resolve(make_spec(), 1)
    assert resolved.files["ds_config.json"] == resolved.settings["ds_config"]


def parsed_by_deepspeed(configs: list[tuple[int, dict[str, Any]]]) -> list[Any]:
    """Stage, accumulation and clipping of each (world, ds_config), as DeepSpeed's own parser has them."""
    done = subprocess.run(
        [sys.executable, "-c", PARSE],
        input=json.dumps(configs),
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.slow
def test_deepspeeds_own_parser_takes_every_config() -> None:
    cases = list(itertools.product(enumerate(SHARDING), ("fp32", "bf16"), (1, 2, 4)))
    configs = [(w, translated(w, memory={"sharding": s}, precision=p)) for (_, s), p, w in cases]
    clips = [0.0 if stage == 0 else 1.0 for (stage, _), _, _ in cases]  # stage 0: the engine clips
    expected = [[s, 4 // w, clip] for ((s, _), _, w), clip in zip(cases, clips, strict=True)]
    assert parsed_by_deepspeed(configs) == expected


def shipped_specs() -> list[Spec]:
    """Of configs/, and of the ds_configs that people write."""
    ds_configs = sorted((Path(__file__).parent / "ds_configs").glob("*.json"))
    imported = [Spec.model_validate(import_file(path, None, None, None).spec) for path in ds_configs]
    return [*(load_spec(path) for path in sorted((ROOT / "configs").glob("*.yaml"))), *imported]


@pytest.mark.slow
def test_deepspeeds_own_parser_takes_what_every_shipped_spec_becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # paths in configs/ are relative to the repository
    specs, translator = shipped_specs(), find_translator(None)
    assert len(specs) >= 18
    configs = [
        (world, cast(dict[str, Any], nested(make(spec, world))))
        for spec in specs
        for world in (spec.launch.processes,)
        for make in (translator.translation, translator.standalone)
    ]
    passes = [spec.accumulation(spec.launch.processes) for spec in specs for _ in range(2)]
    assert [accumulation for _, accumulation, _ in parsed_by_deepspeed(configs)] == passes


@pytest.mark.slow
def test_asking_about_a_spec_imports_nothing_heavy() -> None:
    program = f"""
import sys
from xtrain import registry
from xtrain.exchange.imports import import_file
from xtrain.spec import Spec, load_spec
from xtrain.exchange.translate import find_translator
from xtrain.exchange.translation import nested
spec = Spec.model_validate({{"model": {{"preset": "gpt2-nano"}}, "data": {{"source": "synthetic"}},
    "batch": {{"global": 8, "micro": 2}}, "train": {{"steps": 1}}, "optimizer": {{"lr": 1e-3}}}})
backend = registry.load({BACKEND.name!r})
backend.problems(spec, 2), backend.resolve(spec, 2)
print(sorted({{"torch", "deepspeed", "numpy"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_buckets_and_what_is_gathered_follow_from_the_hidden_size() -> None:
    sharded = {"memory": {"sharding": "parameters"}}
    small, large = (
        translated(1, model={"preset": "gpt2", "hidden": hidden, "heads": 8}, **sharded)["zero_optimization"]
        for hidden in (1024, 2048)
    )
    block = 12 * 1024**2 + 13 * 1024
    assert small["reduce_bucket_size"] == small["stage3_prefetch_bucket_size"] == block
    assert small["stage3_param_persistence_threshold"] == 4 * 1024
    sizes = [key for key in small if key.endswith(("_size", "_distance", "_parameters", "_threshold"))]
    assert len(sizes) == 6
    assert all(large[key] > small[key] for key in sizes)
