"""The figures that the source documents quote, out of the formulas."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from xtrain.cli import main
from xtrain.plan.formulas import FORMULAS, Sizes

SEVEN = Sizes(params=7e9, gpus=4)


def plan(*words: str) -> Result:
    return CliRunner().invoke(main, ["plan", *words], catch_exceptions=False)


def gigabytes(name: str, row: str, sizes: Sizes = SEVEN) -> list[float]:
    return [value / 1e9 for value in FORMULAS[name](sizes).rows[row]]


def test_the_simple_estimate_of_7b() -> None:
    assert gigabytes("simple", "Adam") == pytest.approx([14.0, 14.0, 56.0, 21.5, 105.5], abs=0.05)
    assert gigabytes("simple", "SGD with momentum")[2] == 28.0


def test_mixed_precision_with_a_master_copy_of_7b() -> None:
    assert gigabytes("master", "Adam") == [14.0, 28.0, 28.0, 28.0, 28.0, 126.0]


def test_pure_16_bit_of_the_model_whose_calculator_said_2_37_and_9_49_gib() -> None:
    params = 2.37 * 2**30 / 2
    found = [value / 2**30 for value in FORMULAS["half"](Sizes(params=params)).rows["Adam"]]
    assert found == pytest.approx([2.37, 2.37, 4.74, 9.48], abs=0.011)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("DDP", [14, 28, 56, 98, 392]),
        ("ZeRO-1", [14, 28, 14, 56, 224]),
        ("ZeRO-2", [14, 7, 14, 35, 140]),
        ("ZeRO-3", [3.5, 7, 14, 24.5, 98]),
    ],
)
def test_zero_on_4_gpus(stage: str, expected: list[float]) -> None:
    assert gigabytes("zero", stage) == expected


def test_the_zero_paper_on_64_gpus() -> None:
    sizes = Sizes(params=7.5e9, gpus=64)
    assert gigabytes("paper", "DDP", sizes)[-1] == 120.0
    assert gigabytes("paper", "ZeRO-3", sizes)[-1] == pytest.approx(1.9, abs=0.03)


def test_the_same_activations_are_2_gb_or_21_5_by_what_is_counted() -> None:
    found = {name: row[0] / 1e9 for name, row in FORMULAS["activations"](SEVEN).rows.items()}
    assert found["one tensor per layer"] == pytest.approx(2.1, abs=0.05)
    assert found["10 tensors per layer"] == pytest.approx(21.5, abs=0.05)
    attention = 4 * 2048 * 32 * 5 * 32 * 2048  # b s L, 5 a s bytes
    kept, fused = found["a real layer, attention matrix kept"], found["a real layer, fused attention"]
    assert kept - fused == pytest.approx(attention / 1e9)


def test_parameters_are_divided_by_tensor_and_pipeline_degrees_alone() -> None:
    rows = FORMULAS["parallel"](Sizes(params=7e9, gpus=8)).rows
    computed = {name: row[0] / 1e9 for name, row in rows.items()}
    assert computed == {
        "TP1 x PP1 x SP1": 14.0,
        "TP4 x PP2 x SP1": 1.75,
        "TP2 x PP4 x SP1": 1.75,
        "TP2 x PP2 x SP2": 3.5,
    }


def test_communication_is_the_papers() -> None:
    rows = FORMULAS["communication"](SEVEN).rows
    assert {name: row[0] for name, row in rows.items()} == {"DDP": 2, "ZeRO-1": 2, "ZeRO-2": 2, "ZeRO-3": 3}


@pytest.mark.parametrize("name", FORMULAS)
def test_every_formula_prints_its_table_and_what_it_counts(name: str) -> None:
    result = plan("--formula", name, "--params", "7e9", "--gpus", "4")
    assert result.exit_code == 0
    assert "\n- " in result.stdout
    told = json.loads(plan("--formula", name, "--json").stdout)
    assert set(told) == {"title", "rows", "notes"}


def test_the_zero_table_as_printed() -> None:
    lines = plan("--formula", "zero", "--params", "7e9", "--gpus", "4").stdout.splitlines()
    assert ["ZeRO-3", "3.50", "7.00", "14.00", "24.50", "98.00"] in [line.split() for line in lines]
    assert (
        "- less memory than DDP: ZeRO-1 1.75x, ZeRO-2 2.8x, ZeRO-3 4x (the slogans say 4x, 8x and 4x)"
        in lines
    )


def test_an_unknown_formula_is_told_with_the_nearest() -> None:
    result = plan("--formula", "simpel")
    assert result.exit_code == 2
    assert "found simpel, expected one of" in result.stderr
    assert "nearest: simple" in result.stderr


def test_parameters_must_be_a_number_above_zero() -> None:
    assert plan("--formula", "zero", "--params", "-1").exit_code == 2
    assert plan("--formula", "zero", "--params", "inf").exit_code == 2
