"""Ctrl-C and SIGTERM: before training they end the run, in training they save first; twice is at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LEAVE_SECONDS = 3.0
"""Left to the main thread for leaving in good order before training."""


def exit_code(number: int) -> int:
    """Of a process that a signal ended, as shells say it."""
    return 128 + number


def too_early(number: int) -> str:
    """What to say of a signal that came when there was nothing to save."""
    return f"{signal.Signals(number).name} came before training began: nothing was changed"


class Interrupted(BaseException):
    """Ended by a signal, without saving. Not an Exception: no library may swallow it."""

    def __init__(self, code: int, message: str) -> None:
        self.exit_code = code
        super().__init__(message)


class StopRequest:
    """Takes both signals while it is entered. From `begin` on they are requests, read at `requested`.

    Python's handlers run between two instructions of the main thread, which may wait in a library for hours.
    So a thread hears of signals too, and ends the process where the main thread cannot.
    """

    def __init__(self) -> None:
        self.requested = False
        self._training = False
        self._left = threading.Event()
        self._says = True
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        hears, self._tells = os.pipe()
        os.set_blocking(self._tells, False)
        self._wakeup_before = signal.set_wakeup_fd(self._tells, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(hears,), name="signals", daemon=True).start()
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._take)
        return self

    def begin(self, first: bool) -> None:
        """Training begins: from here on there is something to save. The `first` rank speaks to people."""
        self._says = first
        self._training = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._tells)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self._training:
            raise Interrupted(exit_code(number), too_early(number))
        if self._says and not self.requested:
            name = signal.Signals(number).name
            _say(f"\n{name}: finishing the step and saving; Ctrl-C again leaves at once")
        self.requested = True

    def _listen(self, hears: int) -> None:
        asked = False
        while numbers := os.read(hears, 64):
            for number in numbers:
                if not self._training:
                    self._leave_before_training(number)
                elif asked and number == signal.SIGINT:
                    _say("left at once, as asked; what was saved before stands")
                    os._exit(exit_code(number))
                asked = True
        os.close(hears)

    def _leave_before_training(self, number: int) -> None:
        if not self._left.wait(LEAVE_SECONDS):
            _say(too_early(number))
            os._exit(exit_code(number))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
