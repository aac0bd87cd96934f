"""Ctrl-C and SIGTERM: finish the step, save, say how to go on. A second Ctrl-C leaves at once."""

from __future__ import annotations

import signal
import sys
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, `requested` tells whether someone asked this process to stop."""

    def __init__(self, first: bool) -> None:
        self.requested = False
        self._first = first
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the next one ends the process where it stands
        if self._first:
            name = signal.Signals(number).name
            print(
                f"\n{name}: finishing the step and saving; Ctrl-C again leaves at once",
                file=sys.stderr,
                flush=True,
            )
