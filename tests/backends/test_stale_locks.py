"""A lock nobody holds is removed; one that a compiler works under stays."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

stale_locks: Any = importlib.import_module("xtrain.backends.deepspeed.stale_locks")
GRACE_SECONDS = 0.2


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    path = tmp_path / "some_operator" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def clear(lock: Path) -> list[str]:
    said: list[str] = []
    stale_locks.clear_stale_locks(lock.parent.parent, said.append, GRACE_SECONDS)
    return said


def test_a_lock_of_nobody_is_removed_and_said(lock: Path) -> None:
    (message,) = clear(lock)
    assert not lock.exists()
    assert str(lock) in message


def test_a_lock_is_kept_while_a_process_works_in_its_folder(lock: Path) -> None:
    code = "print('here', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=lock.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as compiler:
        assert compiler.stdout is not None
        compiler.stdout.readline()
        assert clear(lock) == []
        assert lock.exists()
        compiler.communicate("\n")
    assert clear(lock) != []


def test_no_folder_is_no_trouble(tmp_path: Path) -> None:
    said: list[str] = []
    stale_locks.clear_stale_locks(tmp_path / "none", said.append)
    assert said == []
