"""What was asked for on the command line, and how to ask for it again."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from xtrain.errors import RequestError
from xtrain.printable import printable


@dataclass(frozen=True)
class Hosts:
    """One host's place among the hosts of a run, which share a folder and have equally many processes."""

    count: int
    meet: str
    """HOST:PORT at which they meet; that host serves it, and ends the run when it is lost."""
    start_id: str
    """A word that is the same on all hosts and new for every start."""
    address: str | None = None
    """Of this host, as the others reach it; found out where it is not given."""

    @property
    def serves(self) -> bool:
        """Whether the others meet here, as far as this host's address was given."""
        return self.address == self.meet.rpartition(":")[0]

    def words(self) -> list[str]:
        """For the command line."""
        own = ["--address", self.address] if self.address else []
        return ["--nodes", str(self.count), "--meet", self.meet, "--id", self.start_id, *own]


@dataclass(frozen=True)
class Request:
    """The arguments of `xtrain run`."""

    spec_path: Path
    backend: str = "auto"
    out: Path | None = None
    processes: int | None = None
    overrides: tuple[str, ...] = ()
    resume: Path | None = None
    allow_changed: bool = False
    stop_after: int | None = None
    """Absolute: the number of updates after which to stop, saved."""
    max_restarts: int = 0
    """How often workers are started again after one has died."""
    hosts: Hosts | None = None
    """This host's place among several; None alone."""
    spec_text: str | None = None
    """What the spec's file says at the start: it may be edited while data are prepared."""

    @property
    def supervised(self) -> bool:
        """Whether even a single process needs one that watches it."""
        return self.max_restarts > 0 or self.hosts is not None

    def worker_arguments(self, backend: str, processes: int) -> list[str]:
        """For the processes that a launcher starts; alone, it tells them its directory in another way."""
        shared = self.out if self.hosts else None
        own = replace(self, backend=backend, processes=processes, out=shared, max_restarts=0, hosts=None)
        return own.arguments()

    def resume_command(self, run_directory: Path, has_saved: bool) -> str:
        """The command line that goes on with the run in `run_directory`.

        Until that `has_saved` what it trains now, it goes on from a checkpoint of what was trained before.
        """
        return shlex.join([*this_program(), *self.going_on(run_directory, has_saved).arguments()])

    def going_on(self, run_directory: Path, has_saved: bool) -> Request:
        """The same as a request."""
        insists = self.allow_changed and not has_saved
        return replace(self, out=None, resume=run_directory, allow_changed=insists, stop_after=None)

    def arguments(self) -> list[str]:
        """Of `xtrain`, that make this request."""
        words = ["run", str(self.spec_path), "--backend", self.backend, *self._overrides()]
        named = {
            "--nproc": self.processes,
            "--out": self.out,
            "--resume": self.resume,
            "--stop-after": self.stop_after,
            "--max-restarts": self.max_restarts or None,
        }
        words += [word for name, value in named.items() if value is not None for word in (name, str(value))]
        if self.allow_changed:
            words += ["--allow-changed"]
        return words + (self.hosts.words() if self.hosts else [])

    def _overrides(self) -> list[str]:
        return [word for override in self.overrides for word in ("--set", override)]


def this_program() -> list[str]:
    """How to call this xtrain again from the current folder, whatever is on the PATH."""
    script = Path(sys.executable).with_name("xtrain")
    if not script.exists():
        return [sys.executable, "-m", "xtrain"]
    here = Path.cwd()
    return [str(script.relative_to(here) if script.is_relative_to(here) else script)]


def this_python() -> list[str]:
    """For `-m`: a Python that finds this xtrain, also where the current folder has another one.

    Without -P it looks in the current folder first, which is right where this one was found there.
    """
    found_here = Path(__file__).parents[1] == Path.cwd()
    return [sys.executable] if found_here else [sys.executable, "-P"]


def hosts_of(count: int | None, meet: str | None, start_id: str | None, address: str | None) -> Hosts | None:
    """From options of the command line; RequestError where only some are given, or cannot be read."""
    if count is None and meet is None and start_id is None and address is None:
        return None
    if count is None or meet is None or start_id is None:
        raise RequestError("--nodes, --meet and --id belong together; `xtrain launch --print` writes them")
    host, _, port = meet.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise RequestError(f"--meet: found {printable(meet)!r}, expected HOST:PORT such as gpu1:29400")
    return Hosts(count, meet, start_id, address)
