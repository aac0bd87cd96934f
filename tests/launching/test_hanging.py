"""A rank that makes no step ends the run, with the places where all of them stood."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.started import (  # noqa: F401
    ENDLESS,
    Started,
    nobody_is_left,
    starting,
    stuck_model,
    training,
)

pytestmark = pytest.mark.slow


def test_an_endless_loop_in_a_model_is_shown_and_ended_and_the_printed_command_is_valid(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    words = ["--backend", "cpu", "--set=launch.hang_minutes=0.05", *ENDLESS]
    one = training(start, tmp_path, words, stuck_model(tmp_path, "pass"))
    assert one.ended() == 1, one.said()
    assert "rank 0 of 1 on " in one.said()
    assert 'stuck.py", line 12 in forward' in one.said()
    *_, error, go_on = one.said().splitlines()
    assert error.startswith("error: no step for 3 s (launch.hang_minutes): the stacks above show where")
    assert shlex.split(go_on.removeprefix("go on with: "))[-2:] == ["--resume", str(one.out)]


def test_one_stopped_rank_ends_the_run_and_every_rank_shows_where_it_stood(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    words = ["--backend", "deepspeed", "--nproc", "2", "--set=launch.hang_minutes=0.1", *ENDLESS]
    one = training(start, tmp_path, words)
    one.wait_for("step 6/")
    workers = [process for process in one.left_behind() if "xtrain.launching.worker" in process.cmdline()]
    rank_1 = next(process for process in workers if process.environ()["RANK"] == "1")
    rank_1.send_signal(signal.SIGSTOP)
    assert one.ended() == 1, one.said()
    assert nobody_is_left(one)
    for rank in (0, 1):
        assert f"rank {rank} of 2 on " in one.said()
    assert "no step for 6 s (launch.hang_minutes)" in one.said()
    assert one.said().splitlines()[-1].endswith(f"--resume {one.out}")
    assert not psutil.pid_exists(rank_1.pid)
