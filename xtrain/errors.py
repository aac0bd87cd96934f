"""What can go wrong, and the exit code each kind ends with."""

from __future__ import annotations

import os
import traceback
from collections.abc import Sequence
from pathlib import Path

from xtrain.contract import Problem
from xtrain.printable import printable

HERE = Path(__file__).parent
OURS = (f"{HERE}{os.sep}", f"{HERE.parent / 'backends'}{os.sep}")
"""Where xtrain's own code lies, the checkout's too."""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_REQUEST = 2
EXIT_INTERRUPTED = 75


class XtrainError(Exception):
    """An error that people are shown as a message, never as a traceback."""

    exit_code = EXIT_FAILED


class RequestError(XtrainError):
    """What was asked cannot be done: nothing was started, nothing was changed."""

    exit_code = EXIT_REQUEST


class RunFailed(XtrainError):
    """A run began and failed; the message says how to go on."""

    exit_code = EXIT_FAILED


class SpecError(RequestError):
    """A spec with problems, all of them at once.

    `source` names the file (or "--set"); each problem carries its place in it where it is known.
    """

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = len(self.problems)
        head = f"{printable(source)} has {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


class BackendError(RequestError):
    """A backend that does not exist, cannot run here, or cannot honour the spec."""


def described(error: BaseException) -> str:
    """Its kind, its message, and the line of the user's own code where it happened; else of xtrain's."""
    places = [
        place
        for place in traceback.extract_tb(error.__traceback__)
        if "site-packages" not in place.filename and "importlib" not in place.filename
    ]
    own = [place for place in places if not place.filename.startswith(OURS)] or places
    where = f" (at {own[-1].filename}:{own[-1].lineno})" if own else ""
    if isinstance(error, SyntaxError):
        where = f" (at {error.filename}:{error.lineno})"
    return f"{type(error).__name__}: {error}{where}"


def is_about_memory(error: BaseException) -> bool:
    """Whether a device or the host was full: who asked for the memory then has nothing to mend."""
    said = str(error)
    return isinstance(error, MemoryError) or "out of memory" in said or "allocate memory" in said
