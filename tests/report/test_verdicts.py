from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from tests.report.sample_lanes import (
    SPEC,
    STEP,
    compared,
    figures,
    lane,
    memory,
    run,
    slowed,
    steps,
    unfinished,
    verdict,
)
from tests.sample_runs import MIB, sample_memory
from xtrain.records.record import DataFacts, MatmulFacts, ModelFacts, RankBusy, RankMemory, StepPeaks
from xtrain.report.comparison import Comparison
from xtrain.report.runs import LaneRuns, Run
from xtrain.report.tables import Table, tables


def repeats(factor: float = 1.0, **changes: Any) -> list[Run]:
    """Three runs whose speeds differ by a percent or so."""
    return [run(slowed(steps(), factor * unrest), **changes) for unrest in (1.0, 1.01, 0.995)]


def spec_with(section: str, **values: Any) -> dict[str, Any]:
    spec = deepcopy(SPEC)
    spec[section] = {**spec[section], **values}
    return spec


# --- losses -------------------------------------------------------------------------------------


def test_two_runs_of_the_same_lane_are_equal() -> None:
    found = verdict(compared(lane("a"), lane("b")), "losses")
    assert (found.tone, found.headline) == ("good", "The losses agree")
    assert found.details == ["b: equal to a at every step"]


def test_a_learning_rate_one_percent_off_is_called_out_with_its_step() -> None:
    planted = run(steps(lr=1.01e-3), spec=spec_with("optimizer", lr=1.01e-3))
    comparison = compared(lane("a"), lane("b", planted))
    found = verdict(comparison, "losses")
    assert (found.tone, found.headline) == ("bad", "The losses do not agree: b left a")
    assert found.details[0] == (
        "b: its learning rate is another one from step 2: 0.000202 instead of 0.0002 (+1.00%)"
    )
    assert found.details[1].startswith("b: its loss leaves a's at step 3: ")
    assert comparison.warnings == [
        "b was given another training than a: optimizer.lr 0.00101 instead of 0.001"
    ]
    assert verdict(comparison, "choice").headline == "First find out why b learned something else than a"


def test_other_data_and_dropout_leave_the_question_open() -> None:
    other = run(data=DataFacts(description="x", hash="def", portable=True))
    found = verdict(compared(lane("a"), lane("b", other)), "losses")
    assert found.tone == "plain"
    assert found.details == ["b: cannot be held against a: the data may differ"]
    dropped = lane("c", run(spec=spec_with("model", dropout=0.1)))
    assert verdict(compared(lane("a"), dropped), "losses").details == [
        "c: cannot be held against a: dropout is on"
    ]


def test_lanes_without_a_step_in_common_are_not_said_to_agree() -> None:
    found = verdict(compared(lane("a"), lane("b", run([]))), "losses")
    assert found.details == ["b: cannot be held against a: no step in common"]


def test_a_repeat_that_learned_something_else_is_called_out_whichever_it_is() -> None:
    """Its first run is as the reference's: a verdict by that alone would be wrong."""
    later = steps(lr=1.01e-3)
    found = verdict(compared(lane("a", run(), run()), lane("b", run(), run(), run(later))), "losses")
    assert found.headline == "The losses do not agree: b left a"
    assert found.details[0] == (
        "b: its learning rate is another one from step 2: 0.000202 instead of 0.0002 (+1.00%) (repeat 3 of 3)"
    )
    assert "(repeat 3 of 3); the largest difference is " in found.details[1]


def test_a_reference_whose_own_repeats_part_is_called_out() -> None:
    parted = [replace(step, loss=2 * (step.loss or 0)) if step.step == 40 else step for step in steps()]
    for others in ([], [lane("b")]):
        comparison = compared(lane("a", run(), run(parted)), *others)
        found = verdict(comparison, "losses")
        assert (found.tone, found.headline) == ("bad", "The losses do not agree: a's own repeats part")
        assert found.details[0].startswith("a: its loss leaves its first run's at step 40: ")
        assert "(repeat 2 of 2)" in found.details[0]
    assert verdict(comparison, "choice").headline == "First find out why a does not learn the same twice"


# --- speed --------------------------------------------------------------------------------------


def test_a_lane_slowed_by_a_tenth_is_called_slower() -> None:
    found = verdict(compared(lane("a", *repeats()), lane("b", *repeats(1.1))), "speed")
    assert found.headline == "a is the fastest: 10,000 tokens/s"
    assert found.details[0].startswith("b is 9.1% slower than a (noise ")


def test_the_same_lane_twice_is_within_noise() -> None:
    found = verdict(compared(lane("a", *repeats()), lane("b", *reversed(repeats(1.001)))), "speed")
    assert found.tone == "plain"
    assert found.headline.startswith("No lane is faster beyond noise (a: 10,000 tokens/s)")
    assert "within noise" in found.details[0]


def test_the_noise_is_told_in_the_terms_of_the_difference() -> None:
    """Three times the time is 67% slower; a noise of 100% upwards is one of 50% downwards."""
    restless = [run(slowed(steps(), unrest)) for unrest in (1.0, 1.4, 0.7)]
    slow = [run(slowed(steps(), 3 * unrest)) for unrest in (1.0, 1.3, 0.75)]
    detail = verdict(compared(lane("a", *restless), lane("b", *slow)), "speed").details[0]
    slower, noise = (float(share) for share in re.findall(r"([\d.]+)%", detail))
    assert 60 < slower < 75
    assert noise < slower


def test_single_runs_are_told_to_be_repeated() -> None:
    found = verdict(compared(lane("a"), lane("b", run(slowed(steps(), 1.03)))), "speed")
    assert found.headline.startswith("No lane is faster")
    assert found.details[-1].endswith("differences below 5% are not believed; use --repeats 3")


def test_the_fastest_is_the_one_that_the_noted_differences_are_measured_from() -> None:
    """By its middle repeat b is faster, by the mean a is."""
    a = [run(slowed(steps(), factor)) for factor in (0.80, 1.01, 1.02)]
    b = [run(slowed(steps(), factor)) for factor in (0.99, 1.00, 1.01)]
    detail = verdict(compared(lane("b", *b), lane("a", *a)), "speed").details[0]
    assert detail.startswith("b and a: ")
    assert "-" not in detail


def test_lanes_that_were_not_timed_are_left_out() -> None:
    comparison = compared(lane("a"), lane("b", run(speed=None)))
    assert [one.topic for one in comparison.verdicts if one.topic == "speed"] == []


# --- memory -------------------------------------------------------------------------------------


def test_the_leaner_lane_is_named_by_every_instrument_that_both_have() -> None:
    lean = {**STEP, "activations": 20}
    found = verdict(compared(lane("a"), lane("b", run(memory=[memory(lean)]))), "memory")
    assert found.headline == "b needs the least memory"
    assert found.details[0].endswith("b 200.0 MiB, a 300.0 MiB (+50%)")
    assert found.details[1] == "Live tensors, peak: a 300.0 MiB, b 300.0 MiB (+0%)"


def on_device(device: int, host: int) -> RankMemory:
    """MiB."""
    peaks = {"cpu": {"optimizer": host * MIB}, "sim:0": {"parameters": device * MIB}}
    return sample_memory().model_copy(update={"step_peaks": StepPeaks(step=2, peaks=peaks)})


def test_what_is_offloaded_to_the_host_is_not_held_against_the_device() -> None:
    """The lane that offloads has more on the host than the other one anywhere."""
    plain, offloads = lane("a", run(memory=[on_device(300, 1)])), lane("b", run(memory=[on_device(100, 500)]))
    comparison = compared(plain, offloads)
    found = verdict(comparison, "memory")
    assert found.headline == "b needs the least memory"
    assert found.details[:2] == [
        "A step at its fullest, on the device: b 100.0 MiB, a 300.0 MiB (+200%)",
        "A step at its fullest, on the host beside the device: a 1.0 MiB, b 500.0 MiB (500 times)",
    ]
    assert verdict(comparison, "choice").headline.startswith("Choose b: ")


def test_a_prediction_is_held_against_what_was_measured_at_every_place() -> None:
    predicted = {"peak_bytes": {"sim": {"parameters": 330 * MIB}, "cpu": {"optimizer": 480 * MIB}}}
    offloads = run(memory=[on_device(300, 500)], predicted=predicted)
    found = table(compared(lane("a", offloads), lane("b")), "Memory of a step, predicted and measured")
    assert found.rows == [
        ["a", "sim:0", "330.0 MiB", "300.0 MiB", "+10.0%"],
        ["a", "cpu", "480.0 MiB", "500.0 MiB", "-4.0%"],
    ]


def test_a_first_update_is_not_held_against_a_prediction() -> None:
    held = memory().model_copy(update={"step_peaks": StepPeaks(step=1, peaks={"cpu": {"parameters": MIB}})})
    odd = run(memory=[held], predicted={"peak_bytes": {"cpu": {"parameters": MIB, "optimizer": 2 * MIB}}})
    found = figures(compared(lane("a", odd)), "a")
    assert found.step_peaks == {"cpu": {"parameters": MIB}}
    assert found.predicted == {}


def test_a_lane_on_the_host_is_compared_where_it_computes() -> None:
    """300 MiB on the host are its device's; the other lane's host bytes have nothing to meet."""
    found = verdict(compared(lane("a"), lane("b", run(memory=[on_device(200, 400)]))), "memory")
    assert found.details[0].endswith(": b 200.0 MiB, a 300.0 MiB (+50%)")
    assert not any("on the host beside" in detail for detail in found.details)


def test_of_many_lanes_the_leanest_and_the_largest_are_listed() -> None:
    lanes = [lane(f"{n}", run(memory=[memory({"parameters": 10 + n})])) for n in range(8)]
    detail = verdict(compared(*lanes), "memory").details[0]
    smallest = "0 10.0 MiB, 1 11.0 MiB (+10%), 2 12.0 MiB (+20%), 3 13.0 MiB (+30%)"
    assert detail.endswith(f": {smallest}, 3 between, 7 17.0 MiB (+70%)")


def test_a_counted_peak_never_meets_a_sampled_one() -> None:
    counted = lane("a", run(memory=[sample_memory(live_peak=300 * MIB)]))
    sampled = lane("b", run(memory=[sample_memory(live_peak=100 * MIB, method="sampled")]))
    found = verdict(compared(counted, sampled), "memory")
    assert [detail.partition(":")[0] for detail in found.details] == ["Resident set of the process, peak"]
    assert found.headline == "All lanes need the same memory"


def test_lanes_that_share_no_instrument_are_not_compared() -> None:
    counted = sample_memory().model_copy(update={"rss": None})
    sampled = sample_memory(method="sampled").model_copy(update={"rss": None})
    found = verdict(compared(lane("a", run(memory=[counted])), lane("b", run(memory=[sampled]))), "memory")
    assert (found.headline, found.details) == ("No two lanes counted memory alike", [])


# --- bottlenecks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ({"data": 0.05, "forward": 0.05}, "a waits for data (50% of a step)"),
        (
            {"reduce": 0.04, "forward": 0.02, "backward": 0.04},
            "a communicates, or waits for the other processes (40% of a step)",
        ),
        ({"optimizer": 0.05, "backward": 0.05}, "a is held up by the optimizer (50% of a step)"),
        ({"forward": 0.05}, "a spends its time between the phases (50% of a step)"),
        ({"forward": 0.04, "backward": 0.06}, "a computes: forward and backward are 100% of a step"),
    ],
)
def test_the_bottleneck_is_the_phase_that_is_furthest_over_its_share(
    spans: dict[str, float], words: str
) -> None:
    taken = [step if step.step != 6 else type(step)(**{**vars(step), "spans": spans}) for step in steps()]
    found = verdict(compared(lane("a", run(taken))), "bottleneck")
    assert found.details[0].startswith(words)


def test_a_computing_lane_is_held_against_the_matrix_product() -> None:
    matmul = MatmulFacts(dtype="fp32", flops_per_second=2.4e11)
    model = ModelFacts(description="x", parameters=1_000_000, layers=4, hidden=128)
    comparison = compared(lane("a", run(matmul=matmul, model=model)))
    found = figures(comparison, "a").field_speed
    assert found is not None
    assert found.flops_per_token == 6e6 + 12 * 4 * 128 * 125
    assert found.samples_per_second == pytest.approx(80)
    assert found.utilisation == pytest.approx(10_000 * found.flops_per_token / 2.4e11)
    assert "at 28% of what a matrix product reaches here" in verdict(comparison, "bottleneck").details[0]


def test_masked_tokens_are_operations_too() -> None:
    """Of 1,000 tokens a step 250 are targets: as many operations as with all."""
    matmul = MatmulFacts(dtype="fp32", flops_per_second=2.4e11)
    model = ModelFacts(description="x", parameters=1_000_000, layers=4, hidden=128)
    masked = [replace(step, tokens=250) for step in steps()]
    comparison = compared(
        lane("all", run(matmul=matmul, model=model)), lane("some", run(masked, matmul=matmul, model=model))
    )
    every, some = (figures(comparison, name).field_speed for name in ("all", "some"))
    assert every is not None
    assert some is not None
    assert some.utilisation == pytest.approx(every.utilisation)


def table(comparison: Comparison, title: str) -> Table:
    (found,) = [table for table in tables(comparison) if table.title == title]
    return found


def test_communication_is_a_share_of_a_step_or_said_to_be_unknown() -> None:
    spans = {"forward": 0.03, "reduce": 0.01, "backward": 0.05, "optimizer": 0.01}
    apart = [replace(step, spans=spans) if step.spans else step for step in steps()]
    found = table(
        compared(lane("a"), lane("b", run(world=2)), lane("c", run(apart, world=2))), "Time of a traced step"
    )
    column = found.headers.index("communication")
    assert [row[column] for row in found.rows] == ["one process", "not measured", "10%"]


def test_what_a_vendor_counts_and_the_host_s_clock_have_columns_of_their_own() -> None:
    ranks = [RankBusy(device=0.5, host_cores=1.0), RankBusy(device=0.75, host_cores=0.5)]
    silent = run(busy=[RankBusy(device=None, host_cores=1.9)])
    found = table(
        compared(lane("a", silent), lane("b", run(busy=ranks, world=2))), "How busy the machine was"
    )
    assert found.headers == ["lane", "device busy, as its vendor counts", "host cores busy, all processes"]
    assert found.rows == [["a", "not measured", "1.9"], ["b", "62%", "1.5"]]
    assert table(compared(lane("a", silent)), "How busy the machine was").headers[1:] == [
        "host cores busy, all processes"
    ]


def test_the_slowest_rank_stands_beside_the_time_of_a_step() -> None:
    unequal = run(rank_seconds=[{"forward": 1.0}, {"forward": 3.0}], world=2)
    both = compared(lane("a"), lane("b", unequal))
    found = table(both, "Time of a traced step")
    assert found.headers[-1] == "slowest rank"
    assert verdict(both, "bottleneck").details[-1] == (
        "b: its ranks are unequal: the slowest has its forward 50.0% longer than the mean"
    )
    assert [row[-1] for row in found.rows] == ["one rank", "forward 50.0% longer than the mean"]


def test_a_run_without_traced_steps_has_no_bottleneck() -> None:
    comparison = compared(lane("a", run(time_split=None)))
    assert comparison.verdicts == []


# --- which to choose ----------------------------------------------------------------------------


def fast_and_lean() -> tuple[LaneRuns, LaneRuns]:
    lean = [memory({**STEP, "activations": 20})]
    return lane("fast", *repeats()), lane("lean", *repeats(1.25, memory=lean))


def test_speed_and_memory_are_weighed_against_each_other() -> None:
    found = verdict(compared(*fast_and_lean()), "choice")
    assert found.headline == "fast for speed, lean for memory"
    assert found.details == [
        "Choose fast where it fits",
        "Choose lean where memory is short: lean costs 20% of the speed",
    ]


def test_the_lane_that_is_better_in_both_is_chosen() -> None:
    fast, _ = fast_and_lean()
    found = verdict(compared(fast, lane("slow", *repeats(1.25))), "choice")
    assert found.headline == "Choose fast: nothing here is faster beyond noise, or needs less memory"


def test_equal_lanes_are_not_chosen_between() -> None:
    found = verdict(compared(lane("a", *repeats()), lane("b", *repeats())), "choice")
    assert found.headline.startswith("Nothing measured here speaks for one lane")


def test_a_lane_that_ran_out_of_memory_is_a_reason_for_the_other() -> None:
    found = verdict(compared(lane("a"), unfinished("b", "cuda:0 is out of memory")), "choice")
    assert found.headline == "a is the only one that finished"
    assert found.details == ["Not b: it failed: cuda:0 is out of memory"]
