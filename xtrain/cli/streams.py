"""Standard error, for what is said to people: a run does not depend on somebody reading it."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TextIO


class Overheard(io.TextIOBase):
    """Passes on to `stream` what is written, until that fails: its reader is gone, or its disk full.

    So Ctrl-C on `xtrain run ... 2>&1 | tee log`, which ends tee too, saves all the same.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """None: it was closed before this program began."""
        self._stream = stream if stream is not None else _nowhere()

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._stream = _nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._stream = _nowhere()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self._stream.errors


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")
