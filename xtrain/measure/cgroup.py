"""What Linux says of the memory of this process's control groups: what is left, and whom it had to kill.

A process is in one group, and in all those above it; each may have a limit, for all its processes together.
Both versions of the files are read, also where a machine has both (the second version without memory then).
In a container the path of its group may be that of the host, of which only the part below is mounted: then
the groups that are there count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

PROC, MOUNTS = Path("/proc"), Path("/sys/fs/cgroup")
KILLS = "oom_kill"
"""The line that counts them, in all files that have one."""
Verdict: TypeAlias = Literal["yes", "no", "likely", "unknown"]


@dataclass(frozen=True)
class Files:
    """What one version calls its files and lines."""

    limit: str
    used: str
    kills: str
    cache: str
    """Line of memory.stat: what the system would give up before it kills, the groups below included."""


NO_LIMIT = 1 << 62
"""The first version writes its largest number, a little below 2^63, for none."""
V1 = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control", "total_inactive_file")
V2 = Files("memory.max", "memory.current", "memory.events", "inactive_file")


def room_bytes() -> int | None:
    """What the tightest of this process's groups still has for it; None where none has a limit."""
    rooms = []
    for folder, files in _groups():
        limit, used = _number(folder / files.limit), _number(folder / files.used)
        if limit is not None and limit < NO_LIMIT and used is not None:
            rooms.append(limit - used + (_line(folder / "memory.stat", files.cache) or 0))
    return min(rooms, default=None)


@dataclass(frozen=True)
class Kills:
    """How often the system has killed for memory; None where it does not tell."""

    of_group: int | None
    """Processes of this process's own group."""
    anywhere: int | None
    """On this machine, its containers included."""

    @classmethod
    def now(cls) -> Kills:
        own = next(_groups(), None)
        of_group = _line(own[0] / own[1].kills, KILLS) if own else None
        return cls(of_group, _line(PROC / "vmstat", KILLS))

    def explain(self, later: Kills) -> Verdict:
        """Whether a process of this group that was killed in between was killed for memory.

        `likely` where a process was, somewhere on the machine, and this group did not count it.
        """
        if _rose(self.of_group, later.of_group):
            return "yes"
        if _rose(self.anywhere, later.anywhere):
            return "likely"
        return "unknown" if self.of_group is None and self.anywhere is None else "no"


def _rose(before: int | None, after: int | None) -> bool:
    return before is not None and after is not None and after > before


def _groups() -> Iterator[tuple[Path, Files]]:
    """This process's group and those above it, where memory is counted, the innermost first."""
    for line in _read(PROC / "self" / "cgroup").splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if "memory" in controllers.split(","):
            yield from _upwards(MOUNTS / "memory", path, V1)
        elif number == "0":
            yield from _upwards(MOUNTS, path, V2)


def _upwards(root: Path, path: str, files: Files) -> Iterator[tuple[Path, Files]]:
    here = root / path.lstrip("/")
    for folder in (here, *here.parents):
        if folder.is_relative_to(root) and (folder / files.used).is_file():
            yield folder, files


def _number(path: Path) -> int | None:
    """None for `max`, and where there is no such file."""
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _line(path: Path, name: str) -> int | None:
    """The number after `name` in a file of such lines."""
    for line in _read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdecimal():
            return int(value)
    return None


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(errors="replace")
    return ""
