from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from xtrain.records.metrics import MetricsError, MetricsLog, StepRecord, read_metrics


def step_record(step: int, **changes: object) -> StepRecord:
    values = {"loss": 2.5, "lr": 3e-4, "grad_norm": 1.25, "tokens": 512, "seconds": 0.5, "skipped": False}
    return StepRecord(step=step, **{**values, **changes})  # type: ignore[arg-type]


def write_steps(path: Path, *steps: int) -> None:
    log = MetricsLog(path)
    for step in steps:
        log.append(step_record(step))
    log.close()


def test_unknown_optional_keys_are_left_out_and_required_ones_are_null() -> None:
    line = json.loads(step_record(1, grad_norm=None, seconds=None).line())
    assert line == {
        "step": 1,
        "loss": 2.5,
        "lr": 3e-4,
        "grad_norm": None,
        "tokens": 512,
        "seconds": None,
        "skipped": False,
    }


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    full = step_record(
        2,
        loss_scale=65536.0,
        eval_loss=2.25,
        live_bytes=10,
        reserved_bytes=20,
        rss_bytes=30,
        spans={"data": 0.125, "forward": 0.25},
    )
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(step_record(1))
    log.append(full)
    log.sync()
    assert read_metrics(log.path) == [step_record(1), full]
    log.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_figure_that_is_not_finite_is_null_in_memory_and_on_disk(tmp_path: Path, value: float) -> None:
    record = step_record(1, loss=value, grad_norm=value, skipped=True)
    assert record.loss is None
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.append(record)
    log.close()
    assert json.loads(log.path.read_text())["loss"] is None
    assert read_metrics(log.path) == [record]


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    path.write_bytes(path.read_bytes() + b'{"step": 3, "lo')
    assert [r.step for r in read_metrics(path)] == [1, 2]


def test_resume_drops_what_came_after_the_checkpoint_and_leaves_one_line_per_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2, 3, 4)
    path.write_bytes(path.read_bytes() + b'{"step": 5')

    log = MetricsLog(path)
    log.truncate_after(2)
    log.append(step_record(3, loss=9.0))
    log.close()

    assert [(r.step, r.loss) for r in read_metrics(path)] == [(1, 2.5), (2, 2.5), (3, 9.0)]


def test_resume_at_the_last_step_drops_only_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b"{")
    MetricsLog(path).truncate_after(2)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_resume_finds_every_step_among_lines_of_unlike_lengths(tmp_path: Path, count: int) -> None:
    path, whole = tmp_path / "metrics.jsonl", tmp_path / "whole.jsonl"
    log = MetricsLog(whole)
    for step in range(1, count + 1):
        log.append(step_record(step, spans={"forward": 0.5} if step % 3 == 0 else None, lr=10.0**-step))
    log.close()
    lines = whole.read_bytes().splitlines(keepends=True)
    for step in range(count + 1):
        path.write_bytes(whole.read_bytes() + b'{"step"')
        assert MetricsLog(path).truncate_after(step)
        assert path.read_bytes() == b"".join(lines[:step])


@pytest.mark.parametrize("rubbish", [b"{}\n", b"\xff\xfe\n\n", b"\0" * 4096, b"x" * (3 << 20) + b"\n"])
def test_resume_drops_whatever_came_after_the_checkpoint(tmp_path: Path, rubbish: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2, 3)
    whole = path.read_bytes()
    write_steps(path, 4)
    path.write_bytes(path.read_bytes() + rubbish)
    assert MetricsLog(path).truncate_after(3)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("damaged", [2, 3])
def test_resume_behind_a_damaged_last_line_is_refused(tmp_path: Path, damaged: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[damaged - 1 :] = [b"{}\n"] * (4 - damaged)
    path.write_bytes(b"".join(lines))
    with pytest.raises(MetricsError, match=f"ends at step {damaged - 1}, before step 3"):
        MetricsLog(path).truncate_after(3)


def test_resume_reads_no_more_of_a_long_log_than_of_a_short_one(tmp_path: Path) -> None:
    def calls(lines: int) -> int:
        path = tmp_path / f"{lines}.jsonl"
        path.write_text("".join(f"{step_record(step).line()}\n" for step in range(1, lines + 1)))
        log, count = MetricsLog(path), 0

        def counting(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counting)
        try:
            log.truncate_after(lines // 2)
        finally:
            sys.setprofile(None)
        return count

    assert calls(3200) < 2 * calls(100)


def test_resume_from_the_start_empties_the_log(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    MetricsLog(path).truncate_after(0)
    assert read_metrics(path) == []


def test_resume_of_a_run_without_metrics_is_fine(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.truncate_after(10)
    log.append(step_record(11))
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert json.loads(log.path.read_text())["step"] == 11


def test_resume_across_a_gap_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    before = path.read_bytes()
    with pytest.raises(MetricsError, match="ends at step 2, before step 5 of the checkpoint"):
        MetricsLog(path).truncate_after(5)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Invalid JSON"),
        ("[]", "line 2: Input should be an object"),
        ('{"step": 2}', "line 2: loss: Field required"),
        (step_record(2).line().replace("2.5", '"2.5"'), "line 2: loss: Input should be a valid number"),
        (step_record(2).line().replace("2.5", "NaN"), "line 2: loss: Input should be a finite number"),
        (
            step_record(2, rss_bytes=1).line().replace("1}", "1.5}"),
            "line 2: rss_bytes: Input should be a valid",
        ),
        (step_record(4).line(), "line 2: found step 4, expected 2"),
        (step_record(1).line(), "line 2: found step 1, expected 2"),
        ('{"a":' * 5000, "line 2: Invalid JSON: recursion limit exceeded"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{step_record(1).line()}\n{line}\n")
    with pytest.raises(MetricsError) as caught:
        read_metrics(path)
    assert message in str(caught.value)


def test_a_missing_file_and_an_endless_line_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b" " * (2 << 20))
    with pytest.raises(MetricsError, match="line 1: longer than 1048576 bytes"):
        read_metrics(path)


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(step_record(1).line().replace("}", ', "entropy": 1}') + "\n")
    assert read_metrics(path) == [step_record(1)]
