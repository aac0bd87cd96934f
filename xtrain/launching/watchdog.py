"""Ends a process that makes no step: where one rank hangs, all others wait for it, without a word."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from time import monotonic
from types import TracebackType

from xtrain.errors import EXIT_FAILED

LOOK_SECONDS = 1.0
MARGIN_SECONDS = 20.0


class Watchdog:
    """While entered, ends this process when `beat` is not called for `limit_seconds` (None: never).

    Before that it prints where every thread of it stood, and hands `leave` the reason.
    """

    def __init__(self, limit_seconds: float | None, who: str, leave: Callable[[str], None]) -> None:
        self._limit = limit_seconds
        self._who = who
        self._leave = leave
        self._last = monotonic()
        self._done = threading.Event()

    def beat(self) -> None:
        self._last = monotonic()

    def __enter__(self) -> Watchdog:
        self.beat()
        if self._limit is not None:
            threading.Thread(target=self._watch, args=(self._limit,), name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self, limit: float) -> None:
        while not self._done.wait(min(LOOK_SECONDS, limit / 4)):
            # For a library that waits without letting Python's threads run: this one included. A machine
            # with no room for one more thread does without.
            with contextlib.suppress(RuntimeError):
                faulthandler.dump_traceback_later(limit + MARGIN_SECONDS, exit=True, file=sys.__stderr__ or 2)
            if monotonic() - self._last > limit:
                print(f"{self._who} stands here:\n{_stacks()}", file=sys.stderr, flush=True)
                self._leave(
                    f"no step for {_duration(limit)} (launch.hang_minutes): "
                    "the stacks above show where every process stood"
                )
                os._exit(EXIT_FAILED)


def _stacks() -> str:
    """Of all threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"
