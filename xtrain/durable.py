"""Bringing what was written to the disk itself, so that it survives a loss of power."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def flush(descriptor: int) -> None:
    """Return once the content of an open file is on the disk. Raises OSError.

    On macOS fsync hands it to the drive, which may keep it in a cache of its own; F_FULLFSYNC asks the drive
    too (`man 2 fsync` there). File systems that do not know it, those of a network, get fsync.
    """
    to_the_platter: int | None = getattr(fcntl, "F_FULLFSYNC", None)
    if to_the_platter is not None:
        with suppress(OSError):
            fcntl.fcntl(descriptor, to_the_platter)
            return
    os.fsync(descriptor)


def sync(path: Path) -> None:
    """Return once a file's content, or a folder's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)
