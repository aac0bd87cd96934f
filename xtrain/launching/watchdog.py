"""Ends a process that makes no step, or does not leave when it was asked to.

Where one rank hangs, all others wait for it, without a word; and a disk may hang while a state is saved.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from time import monotonic
from types import TracebackType

LOOK_SECONDS = 1.0
MARGIN_SECONDS = 20.0


@dataclass(frozen=True)
class Patience:
    """How long is waited."""

    step_seconds: float = inf
    """From step to step."""
    grace_seconds: float = inf
    """After the process was asked to stop."""

    @property
    def shortest(self) -> float:
        return min(self.step_seconds, self.grace_seconds)


class Watchdog:
    """While entered, ends this process when `beat` is not called for long, or long after it was `asked` to.

    Before that it prints where every thread of it stood, and hands `leave` the reason and whether it was
    asked; that returns the exit code.
    """

    def __init__(
        self, patience: Patience, who: str, asked: Callable[[], bool], leave: Callable[[str, bool], int]
    ) -> None:
        self._patience = patience
        self._who = who
        self._asked = asked
        self._leave = leave
        self._last = monotonic()
        self._done = threading.Event()

    def beat(self) -> None:
        self._last = monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._patience.shortest < inf:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        limit, grace, asked_at = self._patience.step_seconds, self._patience.grace_seconds, inf
        while not self._done.wait(min(LOOK_SECONDS, self._patience.shortest / 4)):
            asked_at = min(asked_at, monotonic() if self._asked() else inf)
            self._end_without_python(limit if asked_at == inf else self._patience.shortest)
            if monotonic() - self._last > limit:
                self._end(f"no step for {_duration(limit)} (launch.hang_minutes)", asked=False)
            if monotonic() - asked_at > grace:
                said = f"not saved {_duration(grace)} after it was asked to stop (launch.grace_seconds)"
                self._end(said, asked=True)

    def _end_without_python(self, seconds: float) -> None:
        """Some time after `seconds`, for a library that lets none of Python's threads run: this one included.

        Put off each time. A machine with no room for one more thread does without.
        """
        if seconds < inf:
            with contextlib.suppress(RuntimeError):
                later = seconds + MARGIN_SECONDS
                faulthandler.dump_traceback_later(later, exit=True, file=sys.__stderr__ or 2)

    def _end(self, why: str, asked: bool) -> None:
        print(f"{self._who} stands here:\n{_stacks()}", file=sys.stderr, flush=True)
        os._exit(self._leave(f"{why}: the stacks above show where every process stood", asked))


def _stacks() -> str:
    """Of all threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"
