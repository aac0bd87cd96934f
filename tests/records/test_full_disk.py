"""A disk that is full outside of a save ends a run with a message, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.records.test_metrics import step_record
from tests.small_runs import run
from xtrain.errors import RunFailed
from xtrain.fitting import HISTORY, Failure, add_failure
from xtrain.records.metrics import MetricsLog
from xtrain.records.rundir import RunDirectory

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="only Linux has a device that is always full")
NO_SPACE = "No space left on device"


def test_a_metrics_log_that_could_not_be_written_can_be_closed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(FULL)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(RunFailed, match=NO_SPACE):
        log.append(step_record(1))
    log.close()


def test_a_lock_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    (tmp_path / "lock").symlink_to(FULL)
    with pytest.raises(RunFailed, match=f"cannot write {tmp_path}/lock"), directory.lock():
        pass


def test_what_is_known_before_the_first_step_cannot_be_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(tmp_path, "--out", out, "--stop-after", 4).exit_code == 0
    (out / f".resolved.json.{os.getpid()}").symlink_to(FULL)
    result = run(tmp_path, "--resume", out)
    assert result.exit_code == 1
    assert f"error: cannot write in {out}: {NO_SPACE}" in result.stderr


def test_a_rung_that_was_too_much_cannot_be_written_down(tmp_path: Path) -> None:
    (tmp_path / f".{HISTORY}.{os.getpid()}").symlink_to(FULL)
    with pytest.raises(RunFailed, match=f"sim:0 is full; cannot write .*{HISTORY}: {NO_SPACE}"):
        add_failure(tmp_path, Failure("a", "sim:0 is full", None))
