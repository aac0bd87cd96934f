"""One lane of a comparison: the same spec on one backend, in a fresh process of its own.

Fresh, because allocator peaks, compile caches and process groups outlive a run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Literal, TypeAlias

from xtrain import registry
from xtrain.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_REQUEST, RequestError
from xtrain.records.summary import clean
from xtrain.request import this_python

Outcome: TypeAlias = Literal["finished", "refused", "failed"]
"""Refused: it cannot run here, and nothing was started. Failed: it began and did not finish."""

GRACE_SECONDS = 60.0
"""A lane that is asked to end may finish its step and save before it is killed."""
LONGEST_REASON = 500
LONGEST_FOLDER_BYTES = 200
"""File systems take 255; compare numbers equal ones."""
_LANE = re.compile(r"(?P<backend>[\w.-]+)(:(?P<processes>[1-9][0-9]{0,5}))?")


@dataclass(frozen=True)
class Lane:
    """A backend, with how many processes where that was said, and what is changed in the spec."""

    backend: str
    processes: int | None = None
    overrides: tuple[str, ...] = ()
    label: str = ""
    """What the overrides are called, for people."""
    rung: int | None = None
    """Index into RUNGS, where it is one of a ladder."""

    @classmethod
    def parse(cls, text: str) -> Lane:
        """From `cpu` or `deepspeed:2`; RequestError for anything else and for unknown backends."""
        match = _LANE.fullmatch(text.strip())
        if match is None:
            raise RequestError(
                f"lane {text!r}: expected a backend such as cpu, or deepspeed:2 for 2 processes"
            )
        backend, processes = match["backend"], match["processes"]
        if backend not in registry.names():
            raise RequestError(
                f"lane {text!r}: no backend named {backend!r}; installed: {', '.join(registry.names())}"
            )
        return cls(backend, int(processes) if processes else None)

    @property
    def engine(self) -> str:
        """Backend and processes, as they were asked for."""
        return self.backend if self.processes is None else f"{self.backend}:{self.processes}"

    @property
    def name(self) -> str:
        return f"{self.engine} {self.label}".strip()

    @property
    def folder(self) -> str:
        """The name without what a file system or a shell might not take; long ones are cut, maybe alike."""
        plain = re.sub(r"[^\w.=]+", "-", self.name).strip("-")
        return plain.encode()[:LONGEST_FOLDER_BYTES].decode(errors="ignore")


LaneCommand: TypeAlias = Callable[[Lane, Path, Path, Sequence[str]], list[str]]
"""(lane, spec, run directory, overrides) -> the command that trains it."""


@dataclass(frozen=True)
class LaneEnd:
    outcome: Outcome
    reason: str | None
    """Why it did not finish, from the end of its output."""
    seconds: float
    """From start to end of the process, imports included."""


def parse_lanes(backends: Sequence[str]) -> list[Lane]:
    """Every lane, in order; RequestError when there is none or one stands twice."""
    lanes = [Lane.parse(text) for text in backends]
    if not lanes:
        raise RequestError("--backends is empty; expected a list such as cpu,deepspeed")
    for lane in lanes:
        if lanes.count(lane) > 1:
            raise RequestError(f"lane {lane.name!r} stands twice in --backends; name each lane once")
    return lanes


def xtrain_run(lane: Lane, spec_path: Path, directory: Path, overrides: Sequence[str]) -> list[str]:
    """The command of a lane: `xtrain run` under this same Python."""
    processes = [] if lane.processes is None else ["--nproc", str(lane.processes)]
    changes = [word for override in (*overrides, *lane.overrides) for word in ("--set", override)]
    command = [*this_python(), "-m", "xtrain", "run", str(spec_path), "--backend", lane.backend]
    return [*command, "--out", str(directory), *processes, *changes]


def run_lane(command: Sequence[str], log: Path) -> LaneEnd:
    """Run it to its end with all output in `log`; it never outlives an interrupted caller.

    The lane has a session of its own, so that Ctrl-C reaches it once, through us.
    """
    began = perf_counter()
    with log.open("wb") as output, _termination_raises():
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait()
        except BaseException:
            _end(process)
            raise
    seconds = perf_counter() - began
    if code == EXIT_DONE:
        return LaneEnd("finished", None, seconds)
    return LaneEnd("refused" if code == EXIT_REQUEST else "failed", _reason(code, log), seconds)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask once, then end the whole session; a second Ctrl-C ends the asking."""
    process.terminate()
    try:
        process.wait(GRACE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def _termination_raises() -> Iterator[None]:
    """SIGTERM becomes SystemExit, so that it passes through `except` and `finally`."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _reason(code: int, log: Path) -> str:
    said = last_error(log)
    if code == EXIT_INTERRUPTED:
        return f"interrupted: {said}"
    if code < 0:
        known = {number.value for number in signal.Signals}
        name = signal.Signals(-code).name if -code in known else f"signal {-code}"
        return f"ended by {name}: {said}"
    return said


def last_error(log: Path) -> str:
    """The last `error:` of the output with what follows it, or else the last line."""
    lines = [
        line for line in log.read_bytes()[-(1 << 16) :].decode(errors="replace").splitlines() if line.strip()
    ]
    starts = [number for number, line in enumerate(lines) if line.lower().startswith("error:")]
    chosen = lines[starts[-1] :] if starts else lines[-1:]
    said = clean(" ".join(chosen)) or "it printed nothing"
    return said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}..."
