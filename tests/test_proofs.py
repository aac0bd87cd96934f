"""The page of proofs: its claims are those that tests are known to prove, and none of these is missing."""

from __future__ import annotations

import ast

import pytest

from tests.proofs import PAGE, PROOFS, ROOT, Case, Proof, read_report, render

CASES = [Case(test, "passed", {}) for proof in PROOFS for test in proof.tests]


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.name)
def test_every_test_of_a_proof_exists(proof: Proof) -> None:
    for test in proof.tests:
        path, _, function = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert function in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def claims(text: str) -> list[list[str]]:
    """Name, claim and tests of each line of the table; the counts and figures are of one run."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| R")]
    return [[line[0], line[1], line[-1]] for line in lines]


def test_the_page_lists_the_proofs_that_exist() -> None:
    expected = claims("\n".join(render(proof, CASES) for proof in PROOFS))
    found = claims(PAGE.read_text(encoding="utf-8"))
    assert found == expected, "run: python -m tests.proofs"


def test_every_numbered_proof_is_there() -> None:
    assert {proof.name.partition(",")[0] for proof in PROOFS} == {f"R{number}" for number in range(1, 10)}


def test_a_failed_or_missing_test_makes_no_page() -> None:
    proof = Proof("R", "", ["tests/test_a.py::test_b"])
    for cases in ([], [Case(proof.tests[0], "failed", {})]):
        with pytest.raises(SystemExit, match=r"R is not proven: tests/test_a\.py::test_b"):
            render(proof, cases)


def test_figures_are_the_worst_of_all_parameters() -> None:
    report = """<testsuites><testsuite>
    <testcase classname="tests.test_a" name="test_b[1]"><properties><property name="error" value="0.5"/>
    </properties></testcase>
    <testcase classname="tests.test_a" name="test_b[2]"><properties><property name="error" value="0.25"/>
    </properties></testcase>
    <testcase classname="tests.test_a" name="test_b[3]"><skipped/></testcase>
    </testsuite></testsuites>"""
    line = render(Proof("R", "it holds", ["tests/test_a.py::test_b"]), list(read_report(report)))
    assert line == "| R | it holds | 2 passed, 1 skipped | error: 0.5 | `tests/test_a.py::test_b` |"
