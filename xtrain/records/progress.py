"""How a run shows that it moves: a bar on a terminal, plain lines elsewhere. All on standard error."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Never, TextIO

from tqdm import tqdm

from xtrain.records.metrics import StepRecord

_BAR = "{n_fmt}/{total_fmt} |{bar}| {desc}, {remaining} left"

_BAR_SECONDS = 0.5
"""A bar says something new at least this often, however long `every` steps take."""


_USUAL_COLUMNS = 80
_WIDEST_COLUMNS = 100


@dataclass
class _Recent:
    """What happened since the last line."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, record: StepRecord) -> None:
        if record.seconds is not None:
            self.tokens += record.tokens
            self.seconds += record.seconds


class Progress:
    """Shows updates `start` + 1 to `total_steps`, of rank 0."""

    def __init__(self, total_steps: int, start: int, every: int, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._start = start
        self._every = every
        self._stream = stream if stream is not None else sys.stderr
        self._recent = _Recent()
        self._began = perf_counter()
        self._described = 0.0
        self._bar: tqdm[Never] | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start,
                file=self._stream,
                bar_format=_BAR,
                desc="starting",
                ncols=_columns(self._stream),
            )

    def update(self, record: StepRecord) -> None:
        """Take the next update; on a terminal the bar moves, elsewhere every `every` steps are a line."""
        self._recent.add(record)
        shown = record.step % self._every == 0 or record.step == self._total_steps
        if self._bar is not None:
            if shown or perf_counter() - self._described > _BAR_SECONDS:
                self._bar.set_description_str(self._describe(record), refresh=False)
            self._bar.update(1)
        elif shown:
            place = f"step {record.step}/{self._total_steps}"
            self.say(f"{place}  {self._describe(record)}, {self._left(record.step)} left")

    def say(self, text: str) -> None:
        """A line for people that does not break the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _describe(self, record: StepRecord) -> str:
        recent, self._recent = self._recent, _Recent()
        self._described = perf_counter()
        parts = ["loss not finite" if record.loss is None else f"loss {record.loss:.4f}"]
        if record.eval_loss is not None:
            parts.append(f"eval loss {record.eval_loss:.4f}")
        if record.skipped:
            parts.append("skipped")
        if recent.seconds:
            parts.append(f"{recent.tokens / recent.seconds:,.0f} tokens/s")
        return ", ".join(parts)

    def _left(self, step: int) -> str:
        """Time left by the wall clock, so that evaluations and checkpoints count."""
        pace_seconds = (perf_counter() - self._began) / max(1, step - self._start)
        return tqdm.format_interval(pace_seconds * (self._total_steps - step))


def _columns(terminal: TextIO) -> int | None:
    """Of the line, whose bar has what the words leave; a terminal may not know its width (of a container)."""
    with suppress(OSError):
        return min(os.get_terminal_size(terminal.fileno()).columns or _USUAL_COLUMNS, _WIDEST_COLUMNS)
    return None
