"""What makes lanes unlike is said at the top of every report."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tests.report.sample_lanes import SPEC, compared, lane, run
from xtrain.report.tables import environment_table


def spec_with(section: str, **values: Any) -> dict[str, Any]:
    spec = deepcopy(SPEC)
    spec[section] = {**spec[section], **values}
    return spec


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"spec": spec_with("train", steps=100)},
            "b was given another training than a: train.steps 100 instead of 60",
        ),
        (
            {"spec": spec_with("optimizer", lr=2e-3, betas=[0.9, 0.99])},
            "b was given another training than a: optimizer.betas [0.9, 0.99] instead of null, "
            "optimizer.lr 0.002 instead of 0.001",
        ),
        (
            {"environment": {"cpu": "Other", "packages": {"torch": "2.13.0"}}},
            "the lanes ran on different machines, and their speeds compare these too (unknown: a; Other: b)",
        ),
        ({"environment": {"packages": {"torch": "2.9.0"}}}, "versions differ: torch"),
    ],
)
def test_lanes_that_differ_are_flagged(changes: dict[str, Any], warning: str) -> None:
    assert compared(lane("a"), lane("b", run(**changes))).warnings == [warning]


def test_lanes_that_differ_alike_are_named_together() -> None:
    changed = run(spec=spec_with("train", steps=100))
    found = compared(lane("a"), lane("b", changed), lane("c", changed)).warnings
    assert found == ["b, c were given another training than a: train.steps 100 instead of 60"]


def test_a_technique_is_no_other_training_and_stands_in_the_environment() -> None:
    comparison = compared(lane("a"), lane("b", run(spec=spec_with("memory", checkpointing={"every": 2}))))
    assert comparison.warnings == []
    assert environment_table(comparison).rows[0] == ["memory.checkpointing", "none", "{'every': 2}"]


def test_what_a_record_says_is_clipped() -> None:
    comparison = compared(lane("a"), lane("b", run(environment={"cpu": "x" * 9999, "packages": {}})))
    assert all(len(warning) < 300 for warning in comparison.warnings)
