from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.sample_runs import GIB, MIB, sample_memory, sample_record, sample_steps
from xtrain.records.metrics import StepRecord
from xtrain.records.record import CounterFacts, MatmulFacts, ModelFacts, RankBusy, StepPeaks
from xtrain.records.summary import clean, format_bytes, format_counter, largest, plural, render_summary

WHOLE = """\
run                                  done after 20 steps on cpu, 1 process
model                                gpt2-nano, 1,000,000 parameters
loss                                 4.6475 -> 2.2463 (lowest 2.2463)
held-out loss                        2.5000 at step 20
speed                                2,000 tokens/s, median of 16 steps (10% to 90%: 2,000 to 2,000; \
left out: 3 for warm-up, 1 traced)
memory, live tensors                 peak 300.0 MiB (counter)
memory, reserved by the allocator    not measured
memory, resident set of the process  peak 2.00 GiB (counter)
time                                 data 10%, forward 30%, backward 50%, other 10% \
(1 traced step)
everything in                        runs/tiny-1"""


def test_the_whole_table() -> None:
    assert render_summary(sample_record(), Path("runs/tiny-1")) == WHOLE


def rows(**changes: Any) -> dict[str, str]:
    lines = render_summary(sample_record(**changes), Path("out")).splitlines()
    width = lines[0].index("done") if "done" in lines[0] else lines[-1].index("out")
    return {line[:width].strip(): line[width:] for line in lines}


def test_what_was_not_measured_is_said_and_never_zero() -> None:
    found = rows(speed=None, time_split=None, memory=[], eval=None)
    unmeasured = ("live tensors", "reserved by the allocator", "resident set of the process")
    for name in ("speed", "time", *(f"memory, {kind}" for kind in unmeasured)):
        assert found[name] == "not measured"
    assert "held-out loss" not in found


def test_a_sampled_peak_says_so_and_ranks_are_not_added_up() -> None:
    ranks = [sample_memory(0, 100 * MIB, "sampled"), sample_memory(1, 200 * MIB, "sampled")]
    expected = "peak 200.0 MiB (sampled), the largest of 2 ranks"
    assert rows(memory=ranks, world=2)["memory, live tensors"] == expected


def test_a_step_s_categories_are_those_of_the_fullest_rank_at_each_place() -> None:
    held = [{"parameters": MIB, "activations": 2 * MIB, "logits": 0}, {"parameters": MIB, "other": 4 * MIB}]
    ranks = [
        sample_memory(number).model_copy(update={"step_peaks": StepPeaks(step=2, peaks={"cuda:0": one})})
        for number, one in enumerate(held)
    ]
    ranks.append(
        sample_memory(2).model_copy(update={"step_peaks": StepPeaks(step=2, peaks={"cpu": held[0]})})
    )
    found = rows(memory=ranks, world=3)
    assert found["memory, a step on cuda:0"] == "5.0 MiB: parameters 1.0 MiB, other 4.0 MiB"
    assert found["memory, a step on cpu"] == "3.0 MiB: parameters 1.0 MiB, activations 2.0 MiB"


def test_a_prediction_has_an_error_where_the_optimizer_s_state_was_there_to_be_measured() -> None:
    """Updates count from 1: a fresh run's first is none, a resumed run's may be."""
    said = {"peak_bytes": {"cpu": {"parameters": MIB, "optimizer": 2 * MIB}}}
    held = {"cpu": {"parameters": MIB, "optimizer": MIB}}
    found = [
        rows(
            memory=[sample_memory().model_copy(update={"step_peaks": StepPeaks(step=step, peaks=held)})],
            predicted=said,
        )["memory, as predicted"]
        for step in (1, 2)
    ]
    assert found == [
        "3.0 MiB: parameters 1.0 MiB, optimizer 2.0 MiB",
        "3.0 MiB (+50.0%): parameters 1.0 MiB, optimizer 2.0 MiB",
    ]


def test_a_failure_and_skipped_steps_are_shown_on_one_line() -> None:
    steps = [*sample_steps(2), StepRecord(3, float("nan"), 1e-3, None, 10, 0.1, True)]
    found = rows(steps=steps, status="failed", failure="disk full\nwhat to do")
    assert found["run"] == "failed after 3 steps (1 skipped) on cpu, 1 process: disk full"
    assert found["loss"].startswith("4.6475 -> not finite (lowest")


def test_a_run_without_steps_has_no_loss() -> None:
    assert rows(steps=[], status="failed")["loss"] == "not measured"


def test_a_counter_without_peak_shows_what_it_has() -> None:
    counter = CounterFacts(bytes=MIB, peak_bytes=None, method="unavailable")
    assert format_counter(counter) == "1.0 MiB at the end, peak not measured"


def test_the_largest_rank_is_the_one_with_the_highest_peak() -> None:
    ranks = [sample_memory(0, None), sample_memory(1, 2 * MIB), sample_memory(2, 5 * MIB)]
    found = largest(ranks, "live")
    assert found is not None
    assert found.peak_bytes == 5 * MIB
    assert largest(ranks, "reserved") is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "not measured"), (0, "0.0 MiB"), (MIB * 3 // 2, "1.5 MiB"), (3 * GIB, "3.00 GiB")],
)
def test_bytes_are_printed_in_binary_units(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def test_plurals() -> None:
    assert [plural(1, "process"), plural(2, "process"), plural(1000, "step")] == [
        "1 process",
        "2 processes",
        "1,000 steps",
    ]


def test_text_from_a_record_cannot_steer_the_terminal() -> None:
    assert clean("a\x1b[31mred\r\nline\u202e") == "a [31mred line"


def test_the_model_s_operations_stand_beside_what_a_matrix_product_reaches() -> None:
    record = sample_record(
        matmul=MatmulFacts(dtype="bf16", flops_per_second=1e11),
        spec={"batch": {"global": 8}, "data": {"seq_len": 125}},
        model=ModelFacts(description="gpt2-nano", parameters=1_000_000, layers=4, hidden=128),
    )
    line = render_summary(record, Path("out")).splitlines()[5]
    assert line.strip() == (
        "16.0 samples/s, 0.0135 TFLOP/s of the model, 14% of the 0.1 that a bf16 matrix product reaches (MFU)"
    )


def test_how_busy_the_machine_was_is_told_as_far_as_it_is_known() -> None:
    known, silent = RankBusy(device=0.5, host_cores=1.0), RankBusy(device=None, host_cores=0.5)
    assert rows(busy=[known, known], world=2)["busy"] == "device 50% of the time; 2.0 of the host's cores"
    assert rows(busy=[known, silent], world=2)["busy"] == "1.5 of the host's cores"
    assert "busy" not in rows(busy=None)


def test_the_slowest_of_several_ranks_is_told() -> None:
    record = sample_record(world=2, rank_seconds=[{"forward": 1.0}, {"forward": 1.5}])
    lines = [line.strip() for line in render_summary(record, Path("out")).splitlines()]
    assert "the slowest of 2 ranks: forward 20.0% longer than the mean" in lines
