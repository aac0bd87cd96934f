"""The arithmetic of the peers' benchmark; the measurement itself is `make peers`."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.measured import Clock, Measured
from benchmarks.overhead_report import WARMUP_STEPS
from benchmarks.peers import LANES, NAMES, PLAIN, turns
from benchmarks.peers_report import (
    BUILT_IN_PLAIN,
    FRAMEWORK_LANES,
    Case,
    LaneRuns,
    against_plain,
    markdown,
)
from benchmarks.workload import SIZES
from xtrain.measure.trace import is_traced
from xtrain.spec.tree import Spec

LOAD = SIZES["small"]


def run(step_seconds: float, loss: float = 5.0, startup: float = 3.0) -> Measured:
    slow = [step < WARMUP_STEPS or is_traced(step, LOAD.steps) for step in range(LOAD.steps)]
    seconds = [9.0 if is_slow else step_seconds for is_slow in slow]
    return Measured(seconds, [loss] * LOAD.steps, 1.0, 1000, 2000, [], 0.5, startup)


def case(runs: LaneRuns, grown: dict[str, int] | None = None) -> Case:
    return Case.of("small", LOAD, PLAIN.name, runs, grown or {})


def between(*ours: tuple[str, Measured]) -> LaneRuns:
    return [(PLAIN.name, run(1.0)), *ours, (PLAIN.name, run(1.0))]


def test_every_lane_has_the_plain_loop_before_and_after_it() -> None:
    order = [lane.name for lane in turns(LANES, rounds=2)]
    assert order[0] == order[-1] == PLAIN.name
    for lane in LANES:
        places = [place for place, name in enumerate(order) if name == lane.name]
        assert len(places) == 2
        assert all(
            PLAIN.name in order[max(0, place - 2) : place] and PLAIN.name in order[place + 1 : place + 3]
            for place in places
        )


def test_a_drift_of_the_machine_cancels() -> None:
    runs: LaneRuns = [("plain loop", run(1.0)), ("ours", run(2 / 1.5)), ("plain loop", run(2.0))]
    assert against_plain("ours", LOAD, "plain loop", runs) == [pytest.approx(1.0)]
    assert against_plain("plain loop", LOAD, "plain loop", runs) == [pytest.approx(0.5)]


def test_the_names_that_are_judged_are_lanes() -> None:
    assert {*FRAMEWORK_LANES, BUILT_IN_PLAIN, "xtrain cpu", "xtrain deepspeed"} < set(NAMES)


@pytest.mark.parametrize(("seconds", "verdict"), [(0.9, "met"), (1.1, "missed")])
def test_a_lane_must_not_be_behind_a_framework(seconds: float, verdict: str) -> None:
    found = list(case(between(("xtrain cpu", run(seconds)), ("Accelerate", run(1.0)))).verdicts())
    assert any(line.startswith("xtrain cpu ahead of Accelerate") and line.endswith(verdict) for line in found)


@pytest.mark.parametrize(("seconds", "verdict"), [(0.95, "met"), (1.05, "noisy"), (1.3, "missed")])
def test_what_the_plain_loop_beside_itself_falls_short_by_is_noise(seconds: float, verdict: str) -> None:
    ours = ("xtrain cpu", run(seconds))
    runs = [(PLAIN.name, run(1.0)), ours, (PLAIN.name, run(1.1)), ours, (PLAIN.name, run(1.0))]
    found = case(runs)
    (said,) = [line for line in found.verdicts() if "of the plain loop, A/A" in line]
    assert said.endswith(verdict)
    assert (said in found.missed) == (verdict == "missed")


def test_the_peak_is_held_against_the_lowest_of_the_other_lanes() -> None:
    lean, fat = replace(run(1.0), peak_bytes=1999), replace(run(1.0), peak_bytes=3000)
    found = list(case(between(("xtrain cpu", run(1.0)), ("Accelerate", lean))).verdicts())
    assert any(line.startswith("xtrain cpu's peak RSS") and line.endswith("missed") for line in found)
    found = list(case(between(("xtrain cpu", run(1.0)), ("Accelerate", fat))).verdicts())
    assert any(line.startswith("xtrain cpu's peak RSS is 1.00") and line.endswith("met") for line in found)


def test_what_was_not_measured_is_no_zero() -> None:
    unknown = replace(run(1.0), cpu_step_seconds=None, startup_seconds=None)
    one = case(between(("xtrain cpu, built-in model", unknown)))
    (lane,) = [lane for lane in one.lanes if "built-in" in lane.lane]
    assert (lane.cpu_step_seconds, lane.startup_seconds, lane.loss_difference) == (None, None, None)


def test_a_late_first_step_and_other_losses_are_told() -> None:
    found = list(case(between(("xtrain cpu", run(1.0, loss=5.1, startup=4.0)))).verdicts())
    assert any(line.startswith("xtrain cpu starts +1.00 s") and line.endswith("missed") for line in found)
    assert found[-1] == "all losses agree: missed"


def test_losses_of_the_built_in_model_are_compared_with_its_own_plain_loop() -> None:
    runs = between(("xtrain cpu, built-in model", run(1.0, loss=4.0)), (BUILT_IN_PLAIN, run(1.0, loss=4.0)))
    assert case(runs).same_training


@pytest.mark.parametrize(("vocabulary", "verdict"), [(257, "met"), (50_257, "missed")])
def test_growth_has_another_bar_where_logits_are_large(vocabulary: int, verdict: str) -> None:
    grown = {PLAIN.name: 100, "xtrain cpu": 90}
    found = Case.of("small", replace(LOAD, vocab_size=vocabulary), PLAIN.name, [], grown)
    assert any("grows by 0.90" in line and line.endswith(verdict) for line in found.verdicts())


def test_a_clock_counts_the_steps_of_somebody_elses_loop() -> None:
    clock = Clock()
    for _ in range(3):
        clock.step_ended()
    training = clock.training([1.0, 2.0, 3.0])
    assert len(training.step_seconds) == 3
    assert training.total_seconds == pytest.approx(sum(training.step_seconds))
    assert training.cpu_step_seconds is not None


def test_the_hugging_face_config_is_the_same_model() -> None:
    config, spec = LOAD.hugging_face_config(), Spec.model_validate(LOAD.spec())
    assert (config["n_layer"], config["n_embd"], config["n_head"]) == (
        spec.model.layers,
        spec.model.hidden,
        spec.model.heads,
    )
    assert (config["vocab_size"], config["n_positions"]) == (spec.model.vocab_size, spec.model.positions)


def test_page_has_a_row_for_each_lane() -> None:
    machine = {"packages": {"torch": "2"}, "cpu": "c", "memory_bytes": 2**30, "platform": "p"}
    machine |= {"python": "3", "git_commit": "abc"}
    header = {"environment": machine, "date": "d", "command": "x", "threads": 1, "remark": "busy"}
    page = markdown(header, [case(between(("xtrain cpu", run(1.0))), {PLAIN.name: 100, "xtrain cpu": 90})])
    assert page.count("| xtrain cpu |") == 2
    assert "**busy**" in page
