"""Facts about the machine and this process, without importing what they are about."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from xtrain.contract import Counter
from xtrain.measure import cgroup

if TYPE_CHECKING:
    from xtrain.contract import JSON

RECORDED_PACKAGES = ("xtrain", "torch", "numpy", "deepspeed", "transformers")
_CPUINFO = Path("/proc/cpuinfo")
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def environment() -> dict[str, JSON]:
    """What a run ran on and with. Without the host's and the user's name: records are shared."""
    return {
        "packages": {name: package_version(name) for name in RECORDED_PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "physical_cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "git_commit": git_commit(Path.cwd()),
    }


def package_version(name: str) -> str | None:
    """The installed version, read from its metadata; None when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str | None:
    """The processor's name as people know it."""
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return _of_cpu("model name") or platform.processor() or None


def cpu_flags() -> frozenset[str]:
    """The instructions of an x86 processor, as Linux names them; empty elsewhere."""
    return frozenset((_of_cpu("flags") or "").split())


def _of_cpu(name: str) -> str | None:
    """The value of a line of Linux's /proc/cpuinfo, of the first processor that has one."""
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    return None


def git_commit(folder: Path) -> str | None:
    """The commit that `folder` is at; with `-changed` when tracked files differ from it. None outside git."""
    commit = _output("git", "-C", str(folder), "rev-parse", "HEAD")
    if commit is None:
        return None
    status = ("--no-optional-locks", "status", "--porcelain", "--untracked-files=no")
    changes = _output("git", "-C", str(folder), *status)
    return f"{commit}-changed" if changes else commit


def resident_bytes() -> Counter:
    """The resident set of this process: now, and the largest so far (see reset_peak_resident)."""
    status = _linux_status()
    if status is not None:
        return Counter(status["VmRSS"], status["VmHWM"], "counter")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB
    return Counter(psutil.Process().memory_info().rss, peak_bytes, "counter")


def reset_peak_resident() -> bool:
    """Begin the peak of resident_bytes anew from here; False where the system cannot."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def host_room_bytes() -> int:
    """What this process can still take of the host: free memory, or less under a limit of its own.

    Limits are those of the process (RLIMIT_AS, which counts addresses) and of its control groups, whose other
    processes have a share of theirs.
    """
    own = psutil.Process().memory_info()
    rooms = [psutil.virtual_memory().available]
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY:
        rooms.append(addresses - own.vms)
    if (room := cgroup.room_bytes()) is not None:
        rooms.append(room)
    return max(0, min(rooms))


def _linux_status() -> dict[str, int] | None:
    """VmRSS and VmHWM in bytes; None where the system does not tell both."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    pairs = (line.partition(":") for line in lines if line.startswith(("VmRSS:", "VmHWM:")))
    found = {key: int(value.split()[0]) * 1024 for key, _, value in pairs}
    return found if len(found) == 2 else None


def _output(*command: str) -> str | None:
    """What a short command prints; None when it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
