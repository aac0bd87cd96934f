"""A lock nobody holds is removed; one that a compiler works under stays."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from time import time
from typing import Any

import pytest

from tests.started import running

stale_locks: Any = importlib.import_module("xtrain.backends.deepspeed.stale_locks")
GRACE_SECONDS = 0.2


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "some_operator" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def clear(lock: Path, on_one_host: bool = True) -> list[str]:
    said: list[str] = []
    stale_locks.clear_stale_locks(lock.parent.parent, on_one_host, said.append, GRACE_SECONDS)
    return said


def test_a_lock_of_nobody_is_removed_and_said(lock: Path) -> None:
    (message,) = clear(lock)
    assert not lock.exists()
    assert str(lock) in message


def test_a_lock_is_kept_while_a_process_works_in_its_folder(lock: Path) -> None:
    code = "print('here', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running([sys.executable, "-c", code], cwd=lock.parent, **pipes) as compiler:
        assert compiler.stdout is not None
        compiler.stdout.readline()
        assert clear(lock) == []
        assert lock.exists()
        compiler.communicate("\n")
    assert clear(lock) != []


def test_no_folder_is_no_trouble(tmp_path: Path) -> None:
    said: list[str] = []
    stale_locks.clear_stale_locks(tmp_path / "none", True, said.append)
    assert said == []


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the locks were where other hosts write too."""
    monkeypatch.setattr(stale_locks, "OF_ONE_HOST", set())


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("age_seconds", "on_one_host", "is_removed"),
    [(60, True, False), (700, False, False), (700, True, True)],
    ids=["another host may compile", "a job of several hosts", "too old for a compiler"],
)
def test_a_lock_that_another_host_may_hold_is_removed_only_when_old(
    lock: Path, age_seconds: int, on_one_host: bool, is_removed: bool
) -> None:
    then = time() - age_seconds
    os.utime(lock, (then, then))
    (message,) = clear(lock, on_one_host)
    assert lock.exists() != is_removed
    assert message.startswith("removed " if is_removed else "DeepSpeed waits while ")
    assert str(lock) in message


def test_the_file_system_of_this_hosts_processes_is_not_shared() -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("needs a file system in memory")
    assert stale_locks.is_of_one_host(Path("/dev/shm"))
    assert not stale_locks.is_of_one_host(Path("/proc/self"))
