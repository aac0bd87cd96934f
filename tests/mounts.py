"""Disks that are full or read-only, for a test: file systems of its own where it may mount them.

Where it may not, a full disk is skipped (`limited_files` is the nearest thing), and a read-only folder is one
that this user may not write into.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """An empty file system of that size at `place`, which is made."""
    place.mkdir()
    with _mounted(place, "-t", "tmpfs", "-o", f"size={size}", "tmpfs"):
        yield place


@contextmanager
def limited_files(largest_bytes: int) -> Iterator[int]:
    """No file of this process grows beyond that, whoever runs it; the errno of a write that fails then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, before[1]))
    try:
        yield errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder: Path) -> Iterator[int]:
    """The folder as it is, for reading alone; the errno of whoever tries to write into it."""
    if os.geteuid() != 0:
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        try:
            yield errno.EACCES
        finally:
            folder.chmod(mode)
        return
    with _mounted(folder, "--bind", str(folder)):  # permissions do not stop root
        subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        yield errno.EROFS


@contextmanager
def _mounted(place: Path, *what: str) -> Iterator[None]:
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system")
    if subprocess.run(["mount", *what, place], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)  # also where something still writes there
