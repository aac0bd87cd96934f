"""Ctrl-C, SIGTERM and SIGKILL sent to real runs of real processes."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests.small_runs import SPEC, checkpoints, metrics, run, steps
from tests.started import (  # noqa: F401
    ENDLESS,
    PRESET,
    Started,
    nobody_is_left,
    running,
    starting,
    stuck_model,
    training,
)
from xtrain.records.record import load_record

pytestmark = pytest.mark.slow

ALONE = ["--backend", "cpu", *ENDLESS]
TOGETHER = ["--backend", "deepspeed", "--nproc", "2", "--set=memory.sharding=parameters", *ENDLESS]
IN_BACKGROUND = ["--set=checkpoint.background=true", "--set=checkpoint.every_steps=1"]
"""There is hardly a moment at which no save is under way."""


def interrupted(one: Started, number: signal.Signals) -> int:
    """Send it in the middle; returns the step at which the run left, saved."""
    one.wait_for("step 6/")
    one.send(number)
    assert one.ended() == 75, one.said()
    assert nobody_is_left(one)
    assert one.said().count(f"{number.name}: finishing the step and saving") == 1
    assert "Traceback" not in one.said()
    reached = steps(one.out)[-1]
    assert steps(one.out) == list(range(1, reached + 1))
    assert checkpoints(one.out)[-1] == reached
    assert load_record(one.out).status == "interrupted"
    return reached


@pytest.mark.parametrize(
    ("words", "number"),
    [
        (ALONE, signal.SIGTERM),
        (ALONE, signal.SIGINT),
        ([*ALONE, *IN_BACKGROUND], signal.SIGTERM),
        ([*TOGETHER, *IN_BACKGROUND], signal.SIGTERM),
    ],
    ids=["cpu-SIGTERM", "cpu-SIGINT", "cpu-SIGTERM-while-saving", "deepspeed-x2-SIGTERM-while-saving"],
)
def test_a_signal_saves_and_the_printed_command_goes_on(
    start: Callable[..., Started],
    tmp_path: Path,
    words: Sequence[str],
    number: signal.Signals,
    record_property: Callable[[str, object], None],
) -> None:
    first = training(start, tmp_path, words)
    reached = interrupted(first, number)
    printed = [line for line in first.said().splitlines() if line.startswith("go on with: ")]
    assert len(printed) == 1
    command = [*shlex.split(printed[0].removeprefix("go on with: ")), "--stop-after", str(reached + 2)]
    second = start(command, first.out)
    assert second.ended() == 0, second.said()
    assert f"after step {reached}" in second.said()
    assert steps(first.out) == list(range(1, reached + 3))
    record_property("signals at any moment of a real run", 1)
    record_property("steps lost to a signal", 0)  # as `interrupted` saw: the last step is the last checkpoint


def test_an_interrupt_of_the_whole_group_saves_once(start: Callable[..., Started], tmp_path: Path) -> None:
    assert interrupted(training(start, tmp_path, TOGETHER), signal.SIGINT) >= 6


@pytest.mark.parametrize("words", [ALONE, TOGETHER], ids=["cpu", "deepspeed-x2"])
def test_a_second_interrupt_leaves_at_once(
    start: Callable[..., Started], tmp_path: Path, words: Sequence[str]
) -> None:
    spec = stuck_model(tmp_path, "print('asleep in a step', flush=True); time.sleep(3600)")
    one = training(start, tmp_path, [*words, "--set=memory.sharding=none"], spec)
    one.wait_for("asleep in a step")
    one.send(signal.SIGINT)
    one.wait_for("SIGINT: finishing the step and saving; Ctrl-C again leaves at once")
    assert one.process.poll() is None
    one.send(signal.SIGINT)
    assert one.ended() == 130
    assert "what was saved before stands" in one.said()
    assert nobody_is_left(one)


SLOW_TO_BUILD = """\
import time

def build(**ignored):
    print("asleep before training", flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("words", [ALONE, TOGETHER], ids=["cpu", "deepspeed-x2"])
def test_a_signal_before_training_is_told_and_leaves_nothing(
    start: Callable[..., Started], tmp_path: Path, words: Sequence[str]
) -> None:
    (tmp_path / "slow_to_build.py").write_text(SLOW_TO_BUILD)
    spec = SPEC.replace(PRESET, "{factory: slow_to_build:build}")
    one = training(start, tmp_path, [*words, "--set=memory.sharding=none"], spec)
    one.wait_for("asleep before training")
    one.send(signal.SIGTERM)
    assert one.ended() == 143
    assert one.said().endswith("SIGTERM came before training began: nothing was changed\n")
    assert nobody_is_left(one)
    assert not one.out.exists()


def test_a_process_that_waits_in_a_library_before_training_ends_too() -> None:
    program = (
        "import ctypes; from xtrain.signals import StopRequest\n"
        "with StopRequest():\n"
        "    print('in', flush=True); mutex = ctypes.create_string_buffer(64)\n"
        "    for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)"
    )
    command = [sys.executable, "-c", program]
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "in\n"
        time.sleep(0.2)
        process.terminate()
        assert process.stderr.read() == "SIGTERM came before training began: nothing was changed\n"
    assert process.returncode == 143


def test_a_killed_launcher_leaves_no_process_behind(start: Callable[..., Started], tmp_path: Path) -> None:
    one = training(start, tmp_path, TOGETHER)
    one.wait_for("step 6/")
    everybody = one.left_behind()
    groups = {os.getpgid(process.pid) for process in everybody}
    assert len(everybody) >= 3  # launcher and two workers
    one.send(signal.SIGKILL)
    one.ended()
    assert nobody_is_left(one)
    deadline = time.monotonic() + 10  # a process that was killed gives its memory back before it is gone
    while left := _alive_in(groups):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _alive_in(groups: set[int]) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if _group(p) in groups and p.status() != psutil.STATUS_ZOMBIE]


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def test_one_directory_has_one_writer_and_a_killed_run_can_be_resumed(
    start: Callable[..., Started], tmp_path: Path
) -> None:
    one = training(start, tmp_path, ALONE)
    one.wait_for("step 6/")
    second = run(tmp_path, "--resume", one.out, backend="cpu", train__steps=1_000_000)
    assert second.exit_code == 2
    assert f"{one.out} is being written by process {one.process.pid}" in second.stderr
    one.send(signal.SIGKILL)
    one.ended()
    saved = checkpoints(one.out)[-1]
    stop = metrics(one.out)[-1].step + 3
    again = run(tmp_path, "--resume", one.out, "--stop-after", stop, backend="cpu", train__steps=1_000_000)
    assert again.exit_code == 0
    assert f"after step {saved}" in again.stderr
    assert steps(one.out) == list(range(1, stop + 1))
