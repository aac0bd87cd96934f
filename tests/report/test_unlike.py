"""What makes lanes unlike is said at the top of every report."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from tests.report.sample_lanes import SPEC, compared, lane, run, slowed, steps
from xtrain.report.environment import environment_table


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


def fitted(rung: Any, **changes: Any) -> Any:
    return run(settings={"memory_auto": {"rung": rung}}, **changes)


def test_repeats_that_memory_auto_trained_unlike_are_lanes_of_their_own_and_flagged() -> None:
    slow = slowed(steps(), 2.0)
    repeats = fitted("as it is"), fitted("batch.micro 2", taken=slow), fitted("as it is")
    comparison = compared(lane("a", *repeats), lane("b", fitted("as it is"), fitted("as it is")))
    rates = {name: len(figures.repeat_rates) for name, figures in comparison.finished}
    assert rates == {"a, as it is": 2, "a, batch.micro 2": 1, "b": 2}
    (warning,) = comparison.warnings
    assert warning.startswith("memory: auto chose unlike techniques")
    assert "(as it is: a, as it is, b; batch.micro 2: a, batch.micro 2)" in warning


def test_lanes_that_memory_auto_trained_alike_stay_whole() -> None:
    comparison = compared(lane("a", fitted("x"), fitted("x")), lane("b", fitted("x")), lane("c"))
    assert [name for name, _ in comparison.finished] == ["a", "b", "c"]
    assert comparison.warnings == []


def test_what_memory_auto_chose_is_clipped() -> None:
    found = compared(lane("a", fitted("x" * 9999), fitted(["<b>"] * 999), run(settings={"memory_auto": 1})))
    assert all(len(text) < 400 for text in (*found.warnings, *(name for name, _ in found.finished)))
    assert len(found.finished) == 3
