"""Locks that a killed process left on DeepSpeed's compiled operators.

torch guards each operator's folder with a file that exists while one process compiles or loads it
(torch.utils.file_baton). A process killed in that moment leaves the file, and every later one waits for
it for ever, without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep, time

import psutil

GRACE_SECONDS = 5.0
"""Loading takes a fraction of that; compiling shows as a process at work in the folder."""
OLD_SECONDS = 600.0
"""No compiler takes so long. What other hosts do cannot be seen, only how old their lock is."""
OF_ONE_HOST = {
    *("apfs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs"),
    *("overlay", "ramfs", "tmpfs", "xfs", "zfs"),
}
"""File systems that no other host writes to."""
LOCK = "lock"


def clear_stale_locks(
    operators: Path, on_one_host: bool, say: Callable[[str], None], grace_seconds: float = GRACE_SECONDS
) -> None:
    """Remove the locks below `operators` that nobody holds; takes no time when there is none.

    Where other hosts may hold them, only old ones, and only if the job is `on_one_host`; others are told.
    """
    for lock in operators.glob(f"*/{LOCK}"):
        if not is_stale(lock, grace_seconds):
            continue
        if is_of_one_host(lock) or (on_one_host and _age_seconds(lock) > OLD_SECONDS):
            lock.unlink(missing_ok=True)
            say(f"removed {lock}, which a killed process had left: DeepSpeed would have waited for ever")
        else:
            say(f"DeepSpeed waits while {lock} is there; if no host is compiling, remove it")


def is_stale(lock: Path, grace_seconds: float) -> bool:
    """Whether the lock outlives the grace period while no process of this host is at work in its folder."""
    deadline = monotonic() + grace_seconds
    while monotonic() < deadline:
        if not lock.exists():
            return False
        sleep(0.05)
    return lock.exists() and not _at_work_in(lock.parent)


def is_of_one_host(path: Path) -> bool:
    """Whether `path` is on a file system that only this host writes to; False where that is not known."""
    whole = path.resolve()
    mounts = [one for one in psutil.disk_partitions(all=True) if whole.is_relative_to(one.mountpoint)]
    return bool(mounts) and max(mounts, key=lambda one: len(one.mountpoint)).fstype in OF_ONE_HOST


def _age_seconds(lock: Path) -> float:
    """0 for one that has gone since."""
    return time() - lock.stat().st_mtime if lock.exists() else 0.0


def _at_work_in(folder: Path) -> bool:
    """torch runs ninja, and ninja the compiler, in the operator's folder."""
    here = str(folder.resolve())
    return any(process.info["cwd"] == here for process in psutil.process_iter(["cwd"]))
