"""Predicted bytes against those the ledger counts on a real step; and `xtrain plan SPEC`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks.plan_accuracy import BF16_WEIGHTS, Case, cases, measure
from tests.small_runs import SPEC
from xtrain.cli import main
from xtrain.contract import MEMORY_CATEGORIES
from xtrain.models.presets import dimensions
from xtrain.plan.step import Step

TOTAL_ERROR = 0.05
CATEGORY_ERROR = 0.05
"""Of the total: small categories are rounding."""

SHAPES = [
    Case(),
    Case(accumulation=1, precision="bf16"),
    Case(precision=BF16_WEIGHTS, layers=2, hidden=256, heads=8),
    Case(vocab_size=4000, loss_chunk="none", precision="bf16"),
    Case(vocab_size=4000, loss_chunk=64),
    Case(layers=2, vocab_size=50_257, micro=1),
]
RECOMPUTED = [
    Case(layers=6, checkpointing={"every": 1}),
    Case(layers=6, checkpointing={"every": 3}, precision="bf16"),
    Case(layers=6, checkpointing={"selective": {"ratio": 0.5}}),
    Case(layers=6, checkpointing={"selective": {"ops": "cheap"}}, precision="bf16"),
    Case(layers=6, checkpointing="auto", precision=BF16_WEIGHTS),
]


@pytest.mark.parametrize("case", SHAPES + RECOMPUTED, ids=str)
def test_the_peak_is_predicted_by_category(case: Case) -> None:
    found = measure(case)
    total = sum(found.measured.values())
    assert abs(found.error) <= TOTAL_ERROR
    for category in MEMORY_CATEGORIES:
        difference = found.predicted.get(category, 0) - found.measured.get(category, 0)
        assert abs(difference) <= CATEGORY_ERROR * total, category


def test_the_benchmark_sweeps_at_least_40_cases() -> None:
    assert len(list(cases())) >= 40


def test_a_step_without_techniques_is_the_highest_of_the_ladder() -> None:
    spec = Case(layers=6).spec()
    plain = Step(spec, dimensions(spec), 2).peak.total
    for changed in RECOMPUTED[:3]:
        other = changed.spec()
        assert Step(other, dimensions(other), 2).peak.total < plain


def plan(path: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["plan", str(path), *words], catch_exceptions=False)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


def test_the_first_rung_that_fits_is_marked(spec: Path) -> None:
    told = json.loads(
        plan(
            spec,
            "--json",
            "--set=batch.global=64",
            "--set=batch.micro=1",
            "--set=data.seq_len=128",
            "--set=model.hidden=64",
        ).stdout
    )
    totals = [rung["total_bytes"] for rung in told["ladder"]]
    assert totals == sorted(totals, reverse=True)
    between = (totals[1] + totals[2]) // 2 / 2**20
    shown = plan(
        spec,
        "--set=batch.global=64",
        "--set=batch.micro=1",
        "--set=data.seq_len=128",
        "--set=model.hidden=64",
        "--device-memory",
        f"{between:.6f}MiB",
    ).stdout
    rows = [line for line in shown.splitlines() if line.startswith(("plain fp32", "+ "))]
    verdicts = ["does not fit" in row for row in rows]
    assert verdicts[:2] == [True, True]
    assert "fits: the first" in rows[2]


def test_the_largest_micro_batch_is_the_last_divisor_that_fits(spec: Path) -> None:
    words = ["--set=batch.global=8", "--set=batch.micro=1"]
    totals = {}
    for micro in (1, 2, 4, 8):
        told = json.loads(plan(spec, "--json", "--set=batch.global=8", f"--set=batch.micro={micro}").stdout)
        totals[micro] = sum(told["peak_bytes"].values())
    memory = f"{(totals[4] + 1) / 2**20:.9f}MiB"
    assert json.loads(plan(spec, *words, "--device-memory", memory, "--json").stdout)["largest_micro"] == 4
    assert "Largest batch.micro that fits: none" in plan(spec, *words, "--device-memory", "0.1MB").stdout


def test_each_stage_of_sharding_needs_less(spec: Path) -> None:
    told = json.loads(plan(spec, "--gpus", "2", "--json").stdout)
    totals = [rung["total_bytes"] for rung in told["sharding"]]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0]
    assert told["sent_bytes"]["parameters"] * 2 == told["sent_bytes"]["none"] * 3


def test_a_model_that_is_not_built_in_is_refused_with_what_works(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    model = "model: {factory: 'some.module:build'}"
    path.write_text(SPEC.replace("model: {preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}", model))
    result = plan(path)
    assert result.exit_code == 2
    assert "found model.factory, expected model.preset" in result.stderr


def test_planning_a_preset_imports_no_torch(spec: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom xtrain.cli import main\n"
        f"assert CliRunner().invoke(main, ['plan', {str(spec)!r}]).exit_code == 0\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
