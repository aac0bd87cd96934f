"""Locks that a killed process left on DeepSpeed's compiled operators.

torch guards each operator's folder with a file that exists while one process compiles or loads it
(torch.utils.file_baton). A process killed in that moment leaves the file, and every later one waits for
it for ever, without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep

import psutil

GRACE_SECONDS = 5.0
"""Loading takes a fraction of that; compiling shows as a process at work in the folder."""
LOCK = "lock"


def clear_stale_locks(
    operators: Path, say: Callable[[str], None], grace_seconds: float = GRACE_SECONDS
) -> None:
    """Remove the locks below `operators` that nobody holds; takes no time when there is none."""
    for lock in operators.glob(f"*/{LOCK}"):
        if is_stale(lock, grace_seconds):
            lock.unlink(missing_ok=True)
            say(f"removed {lock}, which a killed process had left: DeepSpeed would have waited for ever")


def is_stale(lock: Path, grace_seconds: float) -> bool:
    """Whether the lock outlives the grace period while no process is at work in its folder."""
    deadline = monotonic() + grace_seconds
    while monotonic() < deadline:
        if not lock.exists():
            return False
        sleep(0.05)
    return lock.exists() and not _at_work_in(lock.parent)


def _at_work_in(folder: Path) -> bool:
    """torch runs ninja, and ninja the compiler, in the operator's folder."""
    here = str(folder.resolve())
    return any(process.info["cwd"] == here for process in psutil.process_iter(["cwd"]))
