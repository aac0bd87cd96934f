"""Compiled blocks under DeepSpeed: the same training, compiled once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.backends.compiled_worker import CASES
from tests.jobs import ON_THE_CPU, run_job
from xtrain import registry

USABLE = registry.survey()["deepspeed"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not USABLE.usable, reason=USABLE.reason),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("compiled") / "out.json"
    run_job(1, "tests.backends.compiled_worker", out, **ON_THE_CPU)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_and_names_are_those_of_the_uncompiled_model(case: str, report: dict[str, Any]) -> None:
    compiled, plain = report[case]["compiled"], report[case]["plain"]
    tolerance = 1e-3 if "bf16" in case else 1e-5
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=tolerance)
    assert compiled["names"] == plain["names"]


@pytest.mark.parametrize("case", CASES)
def test_all_is_compiled_in_the_first_step(case: str, report: dict[str, Any]) -> None:
    assert report[case]["plain"]["graphs"] == 0
    assert report[case]["compiled"]["graphs"] >= 2  # a block, and the loss
    assert report[case]["compiled"]["graphs_at_the_end"] == report[case]["compiled"]["graphs"]
