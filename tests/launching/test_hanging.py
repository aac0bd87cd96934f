"""A rank that makes no step ends the run, with the places where all of them stood."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.small_runs import SPEC, checkpoints, run, steps
from tests.started import (  # noqa: F401
    ENDLESS,
    PRESET,
    Started,
    nobody_is_left,
    starting,
    stuck_model,
    training,
)
from xtrain.checkpoints.select import select

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


SAVED_EVERY = 4
"""Steps, in SPEC."""


def without_rank_1(start: Callable[..., Started], folder: Path, number: signal.Signals) -> Started:
    """A run of two processes in which the second gets that signal, when it has ended."""
    words = ["--backend", "deepspeed", "--nproc", "2", "--set=launch.hang_minutes=0.1", *ENDLESS]
    one = training(start, folder, words)
    one.wait_for("step 6/")
    workers = [process for process in one.left_behind() if "xtrain.launching.worker" in process.cmdline()]
    rank_1 = next(process for process in workers if process.environ()["RANK"] == "1")
    rank_1.send_signal(number)
    assert one.ended() == 1, one.said()
    assert nobody_is_left(one)
    assert not psutil.pid_exists(rank_1.pid)
    return one


def trained_again(one: Started) -> int:
    """Steps since the last save, which a resume repeats; it goes on here in one process."""
    reached, saved = steps(one.out)[-1], checkpoints(one.out)[-1]
    words = ("--resume", one.out, "--stop-after", reached + 2)
    again = run(one.out.parent, *words, backend="cpu", train__steps=1_000_000)
    assert again.exit_code == 0
    assert f"after step {saved}" in again.stderr
    assert steps(one.out) == list(range(1, reached + 3))
    return reached - saved


def test_one_stopped_rank_ends_the_run_and_every_rank_shows_where_it_stood(
    start: Callable[..., Started], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    one = without_rank_1(start, tmp_path, signal.SIGSTOP)
    for rank in (0, 1):
        assert f"rank {rank} of 2 on " in one.said()
    assert "no step for 6 s (launch.hang_minutes)" in one.said()
    assert one.said().splitlines()[-1].endswith(f"--resume {one.out}")
    repeated = trained_again(one)
    assert repeated <= SAVED_EVERY
    record_property("ranks that hung", 1)
    record_property("steps trained again, of 4 between saves", float(repeated))


def test_one_killed_rank_ends_the_run_and_costs_the_steps_since_the_last_save(
    start: Callable[..., Started], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    one = without_rank_1(start, tmp_path, signal.SIGKILL)
    assert "rank 1 of 2 was killed by SIGKILL" in one.said()
    repeated = trained_again(one)
    assert repeated <= SAVED_EVERY
    record_property("ranks that were killed", 1)
    record_property("steps trained again, of 4 between saves", float(repeated))


HUNG_DISK = """\
import os, time
import torch

class Model(torch.nn.Embedding):
    passes = 0

    def forward(self, tokens):
        self.passes += 1
        if self.passes == 11:  # in step 6, when step 5 was saved
            os.fsync = lambda descriptor: time.sleep(3600)
            print("the disk hangs", flush=True)
        return super().forward(tokens)

def build(**ignored):
    return Model(257, 257)
"""


def test_a_disk_that_hangs_when_a_run_was_asked_to_stop_costs_the_steps_since_the_last_save(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    (tmp_path / "hung_disk.py").write_text(HUNG_DISK)
    spec = SPEC.replace(PRESET, "{factory: hung_disk:build}")
    saving = ["--set=checkpoint={every_steps: 1, background: true}", "--set=launch.grace_seconds=1"]
    one = training(start, tmp_path, ["--backend", "cpu", *saving, *ENDLESS], spec)
    one.wait_for("the disk hangs")
    one.send(signal.SIGTERM)
    assert one.ended() == 75, one.said()
    *_, error, go_on = one.said().splitlines()
    assert error.startswith("error: not saved 1 s after it was asked to stop (launch.grace_seconds): ")
    assert shlex.split(go_on.removeprefix("go on with: "))[-2:] == ["--resume", str(one.out)]
    found = select(one.out, hashes=True).checkpoint
    assert found is not None
    assert found.step in (4, 5)  # the last was perhaps still on its way
