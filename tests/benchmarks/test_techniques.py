"""The arithmetic of the techniques benchmark; the measurement itself is `python -m benchmarks.techniques`."""

from __future__ import annotations

import pytest

from benchmarks.measured import Measured
from benchmarks.techniques import BARS, BOTH, LANES, MODEL, SHORTER, TECHNIQUES, refused
from benchmarks.techniques_report import MemoryResult, SpeedResult, evaluate_speed, memory_bars
from xtrain.models.presets import Dimensions
from xtrain.spec.tree import Spec


def run(step_seconds: float, loss: float = 5.0) -> Measured:
    steps = SHORTER.steps
    return Measured([step_seconds] * steps, [loss] * steps, steps * step_seconds, 1000, 2000, [])


def result(ours: Measured) -> SpeedResult:
    return evaluate_speed("one", 1.35, SHORTER, [run(1.0), run(1.0)], [ours])


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [(run(1.3), "met"), (run(1.4), "missed"), (run(1.3, loss=5.1), "not the same training")],
    ids=["fast", "slow", "other losses"],
)
def test_verdict(ours: Measured, verdict: str) -> None:
    assert result(ours).verdict == verdict


def test_time_is_set_against_the_runs_before_and_after() -> None:
    assert result(run(1.2)).ratio.median == pytest.approx(1.2)


def test_memory_meets_a_bar_only_where_peak_and_growth_do() -> None:
    lanes = [MemoryResult("plain", [1900, 2000, 2100], [200] * 3, []), MemoryResult("ours", [800], [200], [])]
    assert memory_bars(lanes, "ours", {"plain": 0.4})[0].endswith(
        "0.333 of the growth of plain, bar 0.4: met"
    )
    assert memory_bars(lanes, "ours", {"plain": 0.36})[0].endswith("missed")


def test_bars_name_lanes_that_are_measured() -> None:
    assert {*BARS, BOTH.name} <= {lane.name for lane in LANES}


def test_the_model_has_14_million_parameters() -> None:
    spec = Spec.model_validate(MODEL.spec())
    assert (spec.model.layers, spec.model.hidden) == (MODEL.layers, MODEL.hidden)
    size = Dimensions(MODEL.layers, MODEL.hidden, MODEL.heads, MODEL.positions, MODEL.vocab_size)
    blocks = size.layers * (12 * size.hidden**2 + 13 * size.hidden)
    embeddings = (size.vocab_size + size.positions) * size.hidden
    assert blocks + embeddings + 2 * size.hidden == pytest.approx(14e6, rel=0.01)


def test_what_is_measured_is_built() -> None:
    assert not any(refused(technique) for technique in TECHNIQUES if technique.name != "gradient offload")
