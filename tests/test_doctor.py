"""`xtrain doctor`: it tells what is here, and finds a gradient that is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.clean_process import start_module
from tests.small_runs import SPEC
from xtrain import registry
from xtrain.cli import main

FAULTY = '''
import torch


class Faulty(torch.autograd.Function):
    """The identity, whose gradient is 1% too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.01


class Model(torch.nn.Module):
    def __init__(self, faulty):
        super().__init__()
        self.below = torch.nn.Embedding(257, 8)
        self.above = torch.nn.Linear(8, 257)
        self.faulty = faulty

    def forward(self, tokens):
        x = self.below(tokens)
        return self.above(Faulty.apply(x) if self.faulty else x)


built = 0


def build(fault=True):
    """Every model but the first one is faulty: bare torch gets a good one."""
    global built
    built += 1
    return Model(fault and built > 1)
'''


def doctor(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, words)], catch_exceptions=False)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def test_the_table_names_every_backend_and_version() -> None:
    result = doctor()
    assert result.exit_code == 0
    for word in [*registry.names(), "torch", "python", "logical cores", "bf16"]:
        assert word in result.stdout


def test_json_has_the_facts_of_usable_backends() -> None:
    told = json.loads(doctor("--json").stdout)
    assert told["environment"]["packages"]["torch"]
    cpu = told["backends"]["cpu"]
    assert cpu["usable"]
    assert cpu["facts"]["fp32"] == "yes"
    assert cpu["facts"]["threads"] >= 1
    unusable = [one for one in told["backends"].values() if not one["usable"]]
    assert all(one["reason"] and not one["facts"] for one in unusable)


@pytest.mark.parametrize("sets", [(), ("--set=data.masked=0.3",), ("--set=memory.loss_chunk=none",)])
def test_right_gradients_are_called_right(spec: Path, sets: tuple[str, ...]) -> None:
    result = doctor("--grad-check", spec, "--backend", "cpu", "--json", *sets)
    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["right"]
    assert len(told["parameters"]) > 10
    assert max(one["error"] for one in told["parameters"]) < 1e-5


def test_a_tolerance_below_rounding_is_exceeded(spec: Path) -> None:
    """The check compares two computations, not one with itself."""
    result = doctor("--grad-check", spec, "--backend", "cpu", "--tolerance", "0", "--set=memory.loss_chunk=7")
    assert "relative error" in result.stdout


def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **args: Any) -> Path:
    (tmp_path / "faulty_model.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "faulty_model", raising=False)
    path = tmp_path / "spec.yaml"
    model = f"model: {{factory: 'faulty_model:build', args: {json.dumps(args)}}}"
    path.write_text(SPEC.replace("model: {preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}", model))
    return path


def test_a_planted_wrong_gradient_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor("--grad-check", planted(tmp_path, monkeypatch), "--backend", "cpu")
    assert result.exit_code == 1
    assert "WRONG: 1 of 3 gradients differ by more than 0.001" in result.stdout
    first = result.stdout.splitlines()[2]
    assert "below.weight" in first
    assert "1.0e-02" in first
    assert "wrong" in first


def test_without_the_plant_the_same_model_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = doctor("--grad-check", planted(tmp_path, monkeypatch, fault=False), "--backend", "cpu")
    assert result.exit_code == 0, result.stdout


def test_a_missing_spec_is_a_wrong_request(tmp_path: Path) -> None:
    result = doctor("--grad-check", tmp_path / "none.yaml")
    assert result.exit_code == 2
    assert "none.yaml" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "parameters"])
def test_deepspeed_gradients_are_right(spec: Path, tmp_path: Path, sharding: str) -> None:
    words = ["doctor", "--grad-check", str(spec), f"--set=memory.sharding={sharding}"]
    said = tmp_path / "said"
    process = start_module("xtrain", *words, "--backend", "deepspeed", said=said, environ={})
    process.join()
    assert process.exitcode == 0, said.read_text()
    assert "gradients are right" in said.read_text()


def test_a_backend_without_gradients_cannot_be_checked(spec: Path) -> None:
    result = doctor("--grad-check", spec, "--backend", "null")
    assert result.exit_code == 2
    assert "backend null computes no gradients" in result.stderr


@pytest.mark.parametrize("words", [("--tolerance", "1"), ("--grad-check", "s.yaml", "--tolerance", "nan")])
def test_a_tolerance_is_a_number_beside_a_check(words: tuple[str, ...]) -> None:
    result = doctor(*words)
    assert result.exit_code == 2
    assert "expected a finite number beside --grad-check" in result.stderr
