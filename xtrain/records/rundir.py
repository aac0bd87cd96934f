"""The run directory: where everything about one run lies, and who may write there."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from xtrain.durable import flush
from xtrain.errors import RequestError, RunFailed

if TYPE_CHECKING:
    from xtrain.contract import JSON

RUNS = Path("runs")
"""Where runs without `--out` go, below the current folder."""


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. Complete and portable: nothing in it points outside.

    But for a run that went on from another one's checkpoint, until its own first save.
    """

    path: Path

    @classmethod
    def create(cls, out: Path | None, stem: str) -> RunDirectory:
        """A new directory at `out`, or at `runs/<stem>-<n>` with the first free n.

        Raises RequestError when `out` holds anything already or cannot be made. Of two processes
        that create the same directory at once, one succeeds.
        """
        try:
            directory = cls(_first_free(RUNS, stem) if out is None else _made_empty(out))
            directory._lock_file.open("x").close()
        except FileExistsError:
            raise RequestError(_taken(out or RUNS)) from None
        except OSError as error:
            raise RequestError(f"cannot create the run directory {out or RUNS}: {error.strerror}") from error
        return directory

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """The existing run directory at `path`; RequestError when there is none."""
        directory = cls(path)
        if not path.is_dir():
            raise RequestError(f"{path} is not a run directory: {'a file' if path.exists() else 'not there'}")
        marks = (directory._lock_file, directory.resolved, directory.metrics, directory.record)
        if not any(mark.exists() for mark in marks):
            names = ", ".join(mark.name for mark in marks[1:])
            raise RequestError(f"{path} is not a run directory: found none of {names} in it")
        return directory

    @property
    def spec(self) -> Path:
        """The spec as it was given."""
        return self.path / "spec.yaml"

    @property
    def resolved(self) -> Path:
        return self.path / "resolved.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def _lock_file(self) -> Path:
        return self.path / "lock"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one writer; RequestError when another process is, RunFailed when the disk is full.

        The system drops the lock when the process ends, however it ends. The file stays: a lock
        file that is removed can be locked twice.
        """
        with self._open_lock() as file:
            try:
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
            except OSError as error:
                raise RunFailed(f"cannot write {self._lock_file}: {error.strerror}") from error
            try:
                yield
            finally:
                with suppress(OSError):  # a name that stays locks nothing
                    file.truncate(0)

    def _open_lock(self) -> FileIO:
        file = None
        try:
            file = self._lock_file.open("ab", buffering=0)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if file is not None:
                file.close()
            if isinstance(error, BlockingIOError):
                raise RequestError(self._busy()) from None
            raise RequestError(f"cannot lock {self._lock_file}: {error.strerror}") from error
        return file

    def _busy(self) -> str:
        owner = self._lock_file.read_text(encoding="utf-8", errors="replace").strip() or "another process"
        return f"{self.path} is being written by {owner}; wait until it ends, or choose another --out"


def write_json(path: Path, value: JSON) -> None:
    """Write `value` so that readers see the old file or the new one, never a half.

    Raises ValueError for NaN and infinity: JSON has neither.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a whole file at once: beside it first, then renamed."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            flush(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _first_free(parent: Path, stem: str) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = parent / f"{stem}-{number}"
        try:
            path.mkdir()  # fails when it exists, so two runs never get the same
            return path
        except FileExistsError:
            number += 1


def _made_empty(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if any(path.iterdir()):
        raise FileExistsError
    return path


def _taken(path: Path) -> str:
    if not path.is_dir():
        return f"{path} is a file; choose another --out"
    if not any((path / name).exists() for name in ("lock", "record.json", "metrics.jsonl")):
        return f"{path} is not empty; choose another --out"
    return f"{path} already holds a run; choose another --out, or continue it with --resume {path}"
