"""Launching: exit codes, messages and signals come through, and nobody is left behind. Real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from tests.started import running
from xtrain.errors import RequestError
from xtrain.launching import launch
from xtrain.launching.agent import first_failure
from xtrain.launching.launch import start_workers
from xtrain.launching.worker import FOLDER, Ending, leave_word
from xtrain.measure.cgroup import Kills

WORKERS = Path(__file__).parents[1] / "workers"
MARK = "XTRAIN_TEST_OF_LAUNCHING"
UNCOUNTED = Kills.now().explain(Kills.now())
"""What this system tells of a process that nothing but another process killed."""
NOT_FOR_MEMORY = f"rank 1 of 2 was killed by SIGKILL ({launch.KILLED[UNCOUNTED]}); the others were ended"
PATIENCE_SECONDS = 180.0
"""For what takes a second on an idle machine."""

Value = TypeVar("Value")


class Launcher:
    """A process that launches two members, and everything that came of it."""

    def __init__(self, records: Path, folder: Path, *behaviour: str) -> None:
        self.records = records
        environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKERS / "launcher.py"), "2", str(records), *behaviour],
            cwd=folder,
            env={**environ, "PYTHONPATH": str(WORKERS), MARK: str(records), "TMPDIR": str(records)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def end(self) -> tuple[int, str, str]:
        """Exit code, message, and what stood on standard error."""
        out, err = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.process.returncode, json.loads(out.splitlines()[-1])["message"], err

    def record(self, rank: int, fact: str) -> dict[str, Any]:
        """Of a member, once it has told this."""
        file = self.records / f"{rank}.json"

        def told() -> dict[str, Any] | None:
            found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
            return found if fact in found else None

        return wait_for(told)

    def survivors(self) -> list[str]:
        """Command lines of all processes that descend from this launcher, wherever they are by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == str(self.records):
                    found.append(" ".join(process.cmdline()))
            except (psutil.Error, OSError):
                continue
        return found


def wait_for(look: Callable[[], Value | None]) -> Value:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"not seen within {PATIENCE_SECONDS:.0f} s")


@pytest.fixture(scope="session")
def another_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `python -m xtrain` would fail."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "xtrain").mkdir()
    (folder / "xtrain" / "__init__.py").write_text("raise SystemExit('this is another xtrain')")
    return folder


@pytest.fixture
def started(tmp_path: Path, another_checkout: Path) -> Iterator[Callable[..., Launcher]]:
    """Starts launchers; afterwards there must be nothing left of them, neither processes nor files.

    Where they are started lies another xtrain, which no process of theirs is to take for its own.
    """
    launchers: list[Launcher] = []

    def start(*behaviour: str) -> Launcher:
        launchers.append(Launcher(tmp_path, another_checkout, *behaviour))
        return launchers[-1]

    yield start
    for launcher in launchers:
        try:
            wait_for(lambda: not launcher.survivors())  # noqa: B023
            assert [file.name for file in tmp_path.iterdir() if not file.name.endswith(".json")] == []
        finally:
            for process in psutil.process_iter():
                if process.pid != os.getpid() and MARK in _environ(process):
                    process.kill()
            for stream in (launcher.process.stdout, launcher.process.stderr):
                if stream is not None:
                    stream.close()


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}


# --- how it ends ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_form_one_job_and_share_the_cores(
    started: Callable[..., Launcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PET_NODE_RANK", "a default of torchrun's that another job set")
    launcher = started("exits")
    code, message, errors = launcher.end()
    assert (code, message) == (0, "")
    records = [launcher.record(rank, "total") for rank in (0, 1)]
    assert [record["total"] for record in records] == [3.0, 3.0]
    threads = max(1, launch.cores() // 2)
    assert {record["threads"] for record in records} == {str(threads)}
    assert errors.count("OMP_NUM_THREADS") == 1


@pytest.mark.slow
def test_exit_code_of_the_first_failing_worker_comes_through(started: Callable[..., Launcher]) -> None:
    launcher = started("exits", "1", "2", "--nproc", "2")  # torchrun has options of that name
    assert launcher.end()[:2] == (2, "rank 1 of 2 ended with exit code 2; the others were ended")


@pytest.mark.slow
def test_crash_of_a_library_in_a_worker_that_was_done_takes_nothing_back(
    started: Callable[..., Launcher],
) -> None:
    assert started("crashes-when-done").end()[:2] == (0, "")


@pytest.mark.slow
def test_exception_is_told_once_with_its_rank_and_without_torchruns_report(
    started: Callable[..., Launcher],
) -> None:
    code, message, errors = started("raises", "1").end()
    assert code == 1
    assert message.startswith("rank 1 of 2 failed\nTraceback (most recent call last):\n")
    assert message.endswith("\nValueError: the disk is full")
    assert "runpy" not in message
    assert "Traceback" not in errors
    assert "ChildFailedError" not in errors
    assert "Root Cause" not in errors


@pytest.mark.slow
def test_worker_that_failed_and_cannot_leave_is_ended(started: Callable[..., Launcher]) -> None:
    code, message, _ = started("sticks", "1").end()
    assert (code, message.splitlines()[0]) == (1, "rank 1 of 2 failed")
    assert message.endswith("\nValueError: the disk is full")


@pytest.mark.slow
def test_killed_rank_is_named_and_the_ones_that_wait_for_it_end(started: Callable[..., Launcher]) -> None:
    code, message, _ = started("dies", "1").end()
    assert code == 1
    assert message == NOT_FOR_MEMORY


# --- restarts --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_worker_that_dies_is_started_again_with_all_others(
    started: Callable[..., Launcher], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RESTARTS", "2")
    code, message, errors = started("dies-once", "1").end()
    assert (code, message) == (0, "")
    assert "note: rank 1 failed: it died without a word; all start again from the last checkpoint" in errors
    assert (tmp_path / "died.json").read_text() == "1\n"


@pytest.mark.slow
def test_a_worker_that_dies_every_time_ends_the_launch_after_the_last_restart(
    started: Callable[..., Launcher], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RESTARTS", "1")
    code, message, errors = started("dies", "1").end()
    assert code == 1
    assert message == NOT_FOR_MEMORY
    assert errors.count("all start again") == 1
    assert (tmp_path / "died.json").read_text() == "1\n1\n"


@pytest.mark.slow
def test_what_was_refused_is_not_tried_again(
    started: Callable[..., Launcher], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RESTARTS", "5")
    assert started("exits", "1", "2").end()[0] == 2
    assert (tmp_path / "left.json").read_text() == "1\n"


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_lets_every_worker_save_and_the_launch_end_with_75(
    started: Callable[..., Launcher], number: signal.Signals
) -> None:
    launcher = started("saves-when-asked")
    for rank in (0, 1):
        launcher.record(rank, "ready")
    launcher.process.send_signal(number)
    assert launcher.end()[:2] == (75, "")
    assert [launcher.record(rank, "saved")["saved"] for rank in (0, 1)] == [number.name] * 2


@pytest.fixture
def deaf(started: Callable[..., Launcher]) -> Launcher:
    """Its workers listen to no signal, and each has started a process of its own."""
    launcher = started("never-listens")
    for rank in (0, 1):
        launcher.record(rank, "helper")
    return launcher


@pytest.mark.slow
def test_second_interrupt_ends_workers_that_do_not_listen_and_what_they_started(deaf: Launcher) -> None:
    deaf.process.send_signal(signal.SIGTERM)
    deaf.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert deaf.process.poll() is None, "a second SIGTERM is no second Ctrl-C"
    deaf.process.send_signal(signal.SIGINT)
    code, message, _ = deaf.end()
    assert (code, message) == (130, "the workers were ended at once, as asked; what was saved before stands")


@pytest.mark.slow
def test_signal_before_training_began_loses_nothing(started: Callable[..., Launcher]) -> None:
    launcher = started("waits-before-training")
    for rank in (0, 1):
        launcher.record(rank, "pid")
    launcher.process.send_signal(signal.SIGTERM)
    code, message, _ = launcher.end()
    assert (code, message) == (143, "SIGTERM came before training began: nothing was changed")


# --- nobody is left behind -----------------------------------------------------------------------


@pytest.mark.slow
def test_launcher_that_is_killed_leaves_no_process_behind(deaf: Launcher) -> None:
    # launcher, agent, two workers and what each of them started
    assert len(deaf.survivors()) == 6
    deaf.process.kill()
    deaf.process.wait()
    wait_for(lambda: not deaf.survivors())


@pytest.mark.slow
def test_agent_that_is_killed_leaves_no_process_behind(deaf: Launcher) -> None:
    (agent,) = psutil.Process(deaf.process.pid).children()
    agent.kill()
    code, message, _ = deaf.end()
    assert code == 1
    assert message == "the process that watches the workers was killed by SIGKILL; the workers were ended"


@pytest.mark.slow
def test_worker_of_a_launcher_that_is_not_ours_ends_with_it() -> None:
    program = (
        "import time; from xtrain.launching.supervise import watch_parent\n"
        "watch_parent(); print('on', flush=True); time.sleep(60)"
    )
    parent = (
        "import subprocess, sys, time\n"
        "worker = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, text=True)\n"
        "assert worker.stdout.readline()\n"
        "print(worker.pid, flush=True); time.sleep(60)"
    )
    with running([sys.executable, "-c", parent, program], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        worker = psutil.Process(int(launcher.stdout.readline()))
        launcher.kill()
        wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


# --- who is to blame, and what is refused --------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def test_one_that_died_without_a_word_is_blamed_rather_than_those_that_missed_it(folder: Path) -> None:
    leave_word(0, 1, "connection closed by peer")
    assert first_failure(folder, {0: 1, 1: -signal.SIGKILL}, ()) == 1


@pytest.mark.parametrize("code", [1, -signal.SIGABRT])
def test_one_that_spoke_first_is_blamed_rather_than_its_peer(folder: Path, code: int) -> None:
    leave_word(1, 2, "no such spec")
    leave_word(0, 1, "connection closed by peer")
    os.utime(folder / "0.ending", (2e9, 2e9))
    assert first_failure(folder, {0: code, 1: 2}, ()) == 1


def test_one_that_aborted_without_a_word_is_blamed_only_when_nobody_spoke(folder: Path) -> None:
    exit_codes = {0: -signal.SIGTERM, 1: -signal.SIGABRT, 2: -signal.SIGTERM}
    assert first_failure(folder, exit_codes, ()) == 1
    leave_word(2, 1, "the disk is full")
    assert first_failure(folder, exit_codes, ()) == 2


def test_one_that_the_agent_ended_is_not_blamed(folder: Path) -> None:
    leave_word(2, 1, "the disk is full")
    exit_codes = {0: -signal.SIGTERM, 1: -signal.SIGKILL, 2: 1}
    assert first_failure(folder, exit_codes, {1}) == 2


def test_ending_that_says_interrupted_is_orderly() -> None:
    assert [Ending(0, code, "").orderly for code in (0, 75, 1, 2)] == [True, True, False, False]


def test_absurd_number_of_processes_is_refused() -> None:
    most = max(64, 4 * launch.cores())
    with pytest.raises(RequestError) as refused:
        start_workers([], most + 1, os.environ)
    assert str(refused.value) == (
        f"{most + 1} processes were asked for, and this machine has {launch.cores()} cores; at most {most} "
        "are started on it. Ask for fewer with --nproc or launch.processes"
    )


def test_missing_torch_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(
        sys, "meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)]
    )
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with pytest.raises(RequestError) as refused:
        start_workers([], 2, os.environ)
    assert str(refused.value) == (
        f"more than one process needs torch.distributed.run, and {sys.executable} has no torch; "
        "install it with `pip install torch`"
    )
