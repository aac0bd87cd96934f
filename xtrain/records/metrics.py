"""metrics.jsonl: one line per update, whatever happened in between."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, BinaryIO, TypeAlias

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from xtrain.durable import flush
from xtrain.errors import RequestError, RunFailed

LARGEST_METRICS_BYTES = 1 << 30
LARGEST_LINE_BYTES = 1 << 20


Natural: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 63)]


class MetricsError(RequestError):
    """A metrics.jsonl that is missing, damaged, or not what it says."""


@dataclass(frozen=True)
class StepRecord:
    """One update. A figure that is not known, or not finite, is None."""

    __pydantic_config__ = ConfigDict(strict=True, allow_inf_nan=False)

    step: Natural
    """1-based."""
    loss: float | None
    """Mean over the global batch's targets."""
    lr: float
    grad_norm: float | None
    """Global, before clipping, without any loss scale."""
    tokens: Natural
    """Targets in the global batch."""
    seconds: float | None
    """Of this step; the window's mean where the device is asynchronous."""
    skipped: bool
    loss_scale: float | None = None
    eval_loss: float | None = None
    live_bytes: Natural | None = None
    reserved_bytes: Natural | None = None
    rss_bytes: Natural | None = None
    spans: dict[str, float] | None = None
    """Seconds by phase, on traced steps only."""

    def __post_init__(self) -> None:
        # Here rather than when writing, so that what is in memory and what is on disk are equal.
        for name in ("loss", "grad_norm", "seconds", "loss_scale", "eval_loss"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                object.__setattr__(self, name, None)

    def line(self) -> str:
        """JSON without a newline; optional keys that are None are left out."""
        values = {k: v for k, v in asdict(self).items() if v is not None or k not in _OPTIONAL}
        return json.dumps(values, allow_nan=False)


_OPTIONAL = {field.name for field in fields(StepRecord) if field.default is None}
_LINE = TypeAdapter(StepRecord)


class MetricsLog:
    """The file while a run writes it; one process at a time (the run directory's lock)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def append(self, record: StepRecord) -> None:
        """Add one line with one write, so that a reader meets whole lines."""
        data = f"{record.line()}\n".encode()
        try:
            if self._file is None:
                self._file = self.path.open("ab")
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise RunFailed(f"cannot write {self.path}: {error.strerror}") from error

    def sync(self) -> None:
        """Return once every line is on the disk; called before a checkpoint commits."""
        if (file := self._file) is not None:  # it may be called from the thread that saves
            flush(file.fileno())

    def truncate_after(self, step: int) -> bool:
        """Drop the lines after `step`, whatever they are, for a run that goes on from there.

        Reads a few dozen lines, however many there are. Returns whether there are lines up to `step`. Raises
        MetricsError as `require` does.
        """
        return self._up_to(step, cut=True)

    def require(self, step: int) -> None:
        """Raise MetricsError where there are lines and they end before `step`: then there would be a gap."""
        self._up_to(step, cut=False)

    def _up_to(self, step: int, cut: bool) -> bool:
        self.close()
        if not self.path.exists():
            return step == 0
        try:
            with self.path.open("r+b") as file:
                kept_bytes, last = _end_of(file, step)
                if 0 < last < step:
                    raise MetricsError(
                        f"{self.path} ends at step {last}, before step {step} of the checkpoint"
                    )
                if cut:
                    file.truncate(kept_bytes)
                    flush(file.fileno())
        except OSError as error:
            raise MetricsError(f"cannot cut {self.path}: {error.strerror}") from error
        return last == step

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # it tries again to write a line of which `append` has told
                file.close()


def _end_of(file: BinaryIO, step: int) -> tuple[int, int]:
    """Where the last line of a step up to `step` ends, and its step; zeros where there is none.

    Steps rise from line to line, so the place from which no line stays is found by halving. A line that is
    no record does not stay: among those that should, it ends the lines early.
    """

    def goes(place: int) -> bool:
        found = _step_of(_line_from(file, place))
        return found is None or found > step

    first = bisect_left(range(file.seek(0, os.SEEK_END)), True, key=goes)
    if first == 0:
        return 0, 0
    last = _line_from(file, first - 1)  # the last that stays begins there
    return first - 1 + len(last), _step_of(last) or 0


def _line_from(file: BinaryIO, place: int) -> bytes:
    """The first line that begins at `place` or after it; empty where there is no whole one."""
    file.seek(max(0, place - 1))
    if place:
        file.readline(LARGEST_LINE_BYTES)
    line = file.readline(LARGEST_LINE_BYTES)
    return line if line.endswith(b"\n") else b""


def _step_of(line: bytes) -> int | None:
    try:
        return _LINE.validate_json(line).step
    except ValidationError:
        return None


def read_metrics(path: Path) -> list[StepRecord]:
    """All of `each_step` at once, for what draws and compares them."""
    return list(each_step(path))


def each_step(path: Path) -> Iterator[StepRecord]:
    """Every whole line of a metrics.jsonl, which is not trusted; one at a time.

    A last line without its newline was being written when the run was cut off: it is left out.
    Raises MetricsError with the number of the line that is wrong.
    """
    expected: int | None = None
    for number, line in _lines(path):
        record = _parse(path, number, line)
        if expected is not None and record.step != expected:
            raise MetricsError(f"{path}, line {number}: found step {record.step}, expected {expected}")
        expected = record.step + 1
        yield record


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, line with its newline); without a torn last line."""
    try:
        if not path.is_file():
            raise MetricsError(f"{path}: no such file")
        size_bytes = path.stat().st_size
        if size_bytes > LARGEST_METRICS_BYTES:
            raise MetricsError(f"{path} has {size_bytes} bytes; at most {LARGEST_METRICS_BYTES} are read")
        with path.open("rb") as file:
            number = 0
            while (line := file.readline(LARGEST_LINE_BYTES)).endswith(b"\n"):
                number += 1
                yield number, line
    except OSError as error:
        raise MetricsError(f"cannot read {path}: {error.strerror}") from error
    if len(line) == LARGEST_LINE_BYTES:
        raise MetricsError(f"{path}, line {number + 1}: longer than {LARGEST_LINE_BYTES} bytes")


def _parse(path: Path, number: int, line: bytes) -> StepRecord:
    try:
        return _LINE.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise MetricsError(f"{path}, line {number}: {f'{key}: ' if key else ''}{first['msg']}") from None
