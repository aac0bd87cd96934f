"""Recomputation under ZeRO-3, where the weights of a block are not there unless its hooks fetch them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.jobs import ON_THE_CPU, run_job
from xtrain import registry

USABLE = registry.survey()["deepspeed"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not USABLE.usable, reason=USABLE.reason),
]
WAYS = ["each", "groups", "ops"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("recompute") / "out.json"
    run_job(1, "tests.backends.recompute_worker", out, **ON_THE_CPU)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_norms_are_those_without_it(way: str, report: dict[str, Any]) -> None:
    """With dropout, so that the random states are restored here too."""
    assert report[way]["losses"] == pytest.approx(report["none"]["losses"], rel=1e-6)
    assert report[way]["norms"] == pytest.approx(report["none"]["norms"], rel=1e-6)


@pytest.mark.parametrize("way", ["none", *WAYS])
def test_every_parameter_is_let_go_of_after_a_step(way: str, report: dict[str, Any]) -> None:
    """A recomputation ends early, in the middle of a block: nothing may stay gathered for that."""
    assert report[way]["statuses"] == ["NOT_AVAILABLE"]


def test_less_is_kept_for_the_backward_pass(report: dict[str, Any]) -> None:
    none, each, groups, ops = (report[way]["kept_bytes"] for way in ("none", "each", "groups", "ops"))
    assert groups < each < ops < none
    assert each < none / 3
