"""What was asked for on the command line, and how to ask for it again."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path


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

    def worker_arguments(self, backend: str, processes: int) -> list[str]:
        """For the processes that a launcher starts; they are told where to write in another way."""
        words = ["run", str(self.spec_path), "--backend", backend, *self._overrides()]
        words += ["--nproc", str(processes)]
        if self.resume:
            words += ["--resume", str(self.resume)]
        if self.allow_changed:
            words += ["--allow-changed"]
        if self.stop_after:
            words += ["--stop-after", str(self.stop_after)]
        return words

    def resume_command(self, run_directory: Path) -> str:
        """The command line that goes on with the run in `run_directory`."""
        words = [*this_program(), "run", str(self.spec_path), "--backend", self.backend, *self._overrides()]
        if self.processes:
            words += ["--nproc", str(self.processes)]
        return shlex.join([*words, "--resume", str(run_directory)])

    def _overrides(self) -> list[str]:
        return [word for override in self.overrides for word in ("--set", override)]


def this_program() -> list[str]:
    """How to call this xtrain again from the current folder, whatever is on the PATH."""
    script = Path(sys.executable).with_name("xtrain")
    if not script.exists():
        return [sys.executable, "-m", "xtrain"]
    here = Path.cwd()
    return [str(script.relative_to(here) if script.is_relative_to(here) else script)]
