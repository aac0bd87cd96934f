"""What is called on the disk is asked of the disk."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from tests.checkpoints.test_format import TENSORS, state
from xtrain.checkpoints.writer import write
from xtrain.durable import flush, sync

FULL = 51
"""F_FULLFSYNC on macOS."""


class Asked:
    """What the system was asked for, in order; a drive or a network that does not know F_FULLFSYNC."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, knows: bool) -> None:
        self.calls: list[str] = []
        self.knows = knows
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL, raising=False)
        monkeypatch.setattr(fcntl, "fcntl", self._fcntl)
        monkeypatch.setattr(os, "fsync", lambda descriptor: self.calls.append("fsync"))

    def _fcntl(self, descriptor: int, command: int) -> int:
        assert command == FULL
        self.calls.append("full")
        if not self.knows:
            raise OSError(errno.ENOTSUP, "Operation not supported")
        return 0


def test_where_the_platform_can_ask_the_drive_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch, knows=True)
    sync(tmp_path)
    assert asked.calls == ["full"]


def test_a_file_system_that_cannot_ask_the_drive_gets_what_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch, knows=False)
    sync(tmp_path)
    assert asked.calls == ["full", "fsync"]


def test_a_save_asks_the_drive_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(monkeypatch, knows=True)
    write(tmp_path, state(1), TENSORS)
    assert set(asked.calls) == {"full"}


def test_a_disk_that_fails_is_an_error(tmp_path: Path) -> None:
    reading, writing = os.pipe()  # which has no disk
    try:
        with pytest.raises(OSError, match="Invalid argument"):
            flush(writing)
    finally:
        os.close(reading)
        os.close(writing)
