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


def test_beside_them_stands_all_that_is_claimed() -> None:
    rows = FORMULAS["parallel"](Sizes(params=7e9, gpus=8)).rows
    claimed = [[value / 1e9 for value in row[1:]] for row in rows.values()]
    assert claimed == [[14, 28, 42], [3.5, 7, 10.5], [7, 3.5, 10.5], [7, 1.75, 8.75]]


def test_communication_is_the_papers_in_bytes_of_these_parameters() -> None:
    rows = FORMULAS["communication"](SEVEN).rows
    assert {name: row[0] / 14e9 for name, row in rows.items()} == {
        "DDP, 2 P": 2,
        "ZeRO-1, 2 P": 2,
        "ZeRO-2, 2 P": 2,
        "ZeRO-3, 3 P": 3,
    }


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


@pytest.mark.parametrize(
    "words",
    [
        ("--formula", "zero", "--params", "-1"),
        ("--formula", "zero", "--params", "inf"),
        ("--formula", "zero", "--params", "nan"),
        ("--formula", "zero", "--params", "1e308"),
        ("--formula", "simple", "--batch", "9" * 400),
        ("--advise", "--device-memory", "9" * 400 + "GB"),
    ],
)
def test_what_makes_no_finite_figure_is_refused(words: tuple[str, ...]) -> None:
    result = plan(*words, "--json")
    assert result.exit_code == 2
    assert "found" in result.stderr or "range" in result.stderr


def test_the_largest_figures_are_still_json() -> None:
    most = [
        word
        for name in ("batch", "seq", "hidden", "layers", "heads", "gpus")
        for word in (f"--{name}", str(10**9))
    ]
    for name in FORMULAS:
        told = plan("--formula", name, "--params", "1e18", *most, "--json")
        assert told.exit_code == 0
        json.loads(told.stdout, parse_constant=lambda word: pytest.fail(word))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--formula", "zero", "--backend", "cpu"),
            "--backend says nothing with --formula; it belongs to SPEC",
        ),
        (("--formula", "zero", "--set", "train.steps=2"), "--set says nothing with --formula"),
        (("--formula", "zero", "--device-memory", "1GB"), "it belongs to SPEC or --advise or SPEC --advise"),
        (("--advise", "--heads", "8"), "--heads says nothing with --advise; it belongs to --formula"),
        (("--advise", "--bytes", "2"), "--bytes says nothing with --advise"),
        (("spec.yaml", "--params", "7e9"), "--params says nothing with SPEC"),
        (("spec.yaml", "--seq", "128"), "--seq says nothing with SPEC"),
        (("spec.yaml", "--advise", "--seq", "128"), "--seq says nothing with SPEC --advise"),
        (
            ("--advise", "--formula", "zero"),
            "expected one of SPEC, --formula, --advise and SPEC --advise, found --formula and --advise",
        ),
        ((), "found none of them"),
    ],
)
def test_an_option_of_another_question_is_refused_by_name(words: tuple[str, ...], message: str) -> None:
    result = plan(*words)
    assert result.exit_code == 2
    assert message in result.stderr
