"""`xtrain translate`: the config alone on standard output, origins on request, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from xtrain.cli import main

SPEC = """\
model: {preset: gpt2-nano}
data: {source: synthetic}
batch: {global: 8, micro: 2}
train: {steps: 5, clip: 0.5}
optimizer: {lr: 1e-3}
schedule: constant
memory: {sharding: gradients}
deepspeed: {zero_optimization: {overlap_comm: false}}
"""


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def translate(spec: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["translate", str(spec), *options])


def test_the_config_is_alone_on_standard_output(spec: Path) -> None:
    done = translate(spec, "--world", "2")
    config = json.loads(done.stdout)
    assert config["train_batch_size"] == 8
    assert config["gradient_accumulation_steps"] == 2
    assert config["zero_optimization"]["stage"] == 2
    assert (done.exit_code, done.stderr) == (0, "")


def test_the_same_spec_gives_the_same_bytes(spec: Path) -> None:
    assert translate(spec).stdout == translate(spec).stdout


def test_every_key_has_an_origin(spec: Path) -> None:
    listed = {row["key"]: row for row in json.loads(translate(spec, "--origins", "--json").stdout)}
    assert listed["gradient_clipping"] == {"key": "gradient_clipping", "value": 0.5, "origin": "train.clip"}
    assert listed["zero_optimization.overlap_comm"]["origin"] == "deepspeed.zero_optimization.overlap_comm"
    assert listed["communication_data_type"]["origin"].startswith("precision.weights (default): ")
    assert listed["zero_optimization.contiguous_gradients"]["origin"].startswith("fixed: ")
    assert all(row["origin"] for row in listed.values())


def test_origins_are_a_table_for_people(spec: Path) -> None:
    lines = translate(spec, "--origins").stdout.splitlines()
    assert lines[0].split() == ["key", "value", "from"]
    assert any(line.split() == ["gradient_clipping", "0.5", "train.clip"] for line in lines)


def test_standalone_has_optimizer_and_clip(spec: Path) -> None:
    config = json.loads(translate(spec, "--standalone").stdout)
    assert config["optimizer"]["type"] == "AdamW"
    assert config["optimizer"]["params"]["lr"] == 1e-3
    assert "scheduler" not in config


def test_what_standalone_cannot_carry_is_refused_with_its_place(spec: Path) -> None:
    done = translate(spec, "--standalone", "--set", "data.masked=0.3")
    assert done.exit_code == 2
    assert done.stdout == ""
    assert "--set data.masked=0.3: data.masked: found 0.3, expected 0" in done.stderr


def test_processes_that_do_not_divide_the_batch_are_refused(spec: Path) -> None:
    done = translate(spec, "--world", "3")
    assert done.exit_code == 2
    assert "batch.global: found 8, expected a multiple of micro (2) x processes (3) = 6" in done.stderr


@pytest.mark.parametrize("backend", ["cpu", "null"])
def test_a_backend_without_a_config_says_so(spec: Path, backend: str) -> None:
    done = translate(spec, "--backend", backend)
    assert done.exit_code == 2
    assert f"backend '{backend}' has no config to translate a spec to" in done.stderr
    assert "deepspeed" in done.stderr


@pytest.mark.parametrize("elsewhere", ["model.init_from", "data.path"])
def test_what_only_another_machine_has_is_no_reason_to_refuse(spec: Path, elsewhere: str) -> None:
    words = [
        "--set",
        "data.source=text",
        "--set",
        "data.path=texts/*.txt",
        "--set",
        "model.init_from=weights",
    ]
    assert translate(spec, *words).exit_code == 0
    checked = CliRunner().invoke(main, ["check", str(spec), *words])
    assert f"{elsewhere}: found " in checked.stderr


@pytest.mark.parametrize("form", [[], ["--standalone"]], ids=str)
def test_under_memory_auto_it_is_said_that_another_config_may_be_chosen(spec: Path, form: list[str]) -> None:
    spec.write_text(SPEC.partition("memory:")[0] + "memory: auto\n")
    done = translate(spec, *form)
    assert done.exit_code == 0
    assert done.stdout == translate(spec, "--set", "memory={}", *form).stdout
    assert done.stderr.startswith("note: memory: auto chooses techniques when a run starts")


def test_overrides_of_another_stage_are_left_out_and_said(spec: Path) -> None:
    other = "deepspeed={zero_optimization: {overlap_comm: false, stage3_max_reuse_distance: 5}}"
    done = translate(spec, "--set", other)
    assert (done.exit_code, done.stdout) == (0, translate(spec).stdout)
    assert done.stderr == (
        "note: deepspeed.zero_optimization.stage3_max_reuse_distance does nothing here: DeepSpeed reads it "
        "only at ZeRO stage 3: leave it out, or set memory.sharding: parameters\n"
    )
    assert "5" in translate(spec, "--set", other, "--set", "memory.sharding=parameters").stdout


@pytest.mark.parametrize(("sharding", "said"), [("none", False), ("parameters", True)])
def test_sizes_that_only_the_built_model_tells_are_said_to_come_with_a_run(
    spec: Path, sharding: str, said: bool
) -> None:
    words = ["--set", "model={factory: stand:in}", "--set", "deepspeed={}"]
    done = translate(spec, *words, "--set", f"memory.sharding={sharding}")
    assert done.exit_code == 0
    assert (
        "note: ZeRO's sizes follow from the model, which is known once it is built" in done.stderr
    ) is said
