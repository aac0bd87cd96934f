from __future__ import annotations

import io
import os
import pty
import re
import termios
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from xtrain.records.metrics import StepRecord
from xtrain.records.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(first: int, last: int, **changes: object) -> list[StepRecord]:
    values = {"loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, "tokens": 1000, "seconds": 0.5, "skipped": False}
    return [StepRecord(step=n, **{**values, **changes}) for n in range(first, last + 1)]  # type: ignore[arg-type]


def shown(stream: io.StringIO, total: int, records: list[StepRecord], every: int = 10) -> str:
    with closing(Progress(total, records[0].step - 1, every, stream)) as progress:
        for record in records:
            progress.update(record)
    return stream.getvalue()


def test_without_a_terminal_every_tenth_and_the_last_step_is_a_line() -> None:
    lines = shown(io.StringIO(), 25, steps(1, 25)).splitlines()
    assert [line.split()[1] for line in lines] == ["10/25", "20/25", "25/25"]
    assert re.fullmatch(r"step 10/25  loss 2\.5000, 2,000 tokens/s, \d\d:\d\d left", lines[0])
    assert lines[2].endswith("2,000 tokens/s, 00:00 left")


def test_speed_is_that_of_the_steps_since_the_last_line() -> None:
    records = steps(1, 2) + steps(3, 4, seconds=0.25)
    lines = shown(io.StringIO(), 4, records, every=2).splitlines()
    assert "2,000 tokens/s" in lines[0]
    assert "4,000 tokens/s" in lines[1]


def test_untimed_steps_show_no_speed_rather_than_a_made_up_one() -> None:
    assert "tokens/s" not in shown(io.StringIO(), 1, steps(1, 1, seconds=None))


def test_evaluation_skips_and_broken_losses_are_said() -> None:
    text = shown(io.StringIO(), 1, steps(1, 1, loss=float("nan"), eval_loss=2.25, skipped=True))
    assert "loss not finite, eval loss 2.2500, skipped, " in text


def test_a_terminal_gets_a_bar_that_starts_where_the_run_goes_on() -> None:
    text = shown(Terminal(), 20, steps(11, 20))
    frames = text.split("\r")
    assert any("10/20" in frame for frame in frames)
    assert "20/20" in frames[-1]
    assert "loss 2.5000, 2,000 tokens/s, 00:00 left" in frames[-1]
    assert "step " not in text


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_saying_is_a_line_of_its_own(stream: io.StringIO) -> None:
    with closing(Progress(20, 0, 10, stream)) as progress:
        progress.update(steps(1, 1)[0])
        progress.say("checkpoint saved")
    assert "checkpoint saved" in stream.getvalue().replace("\r", "\n").split("\n")


def test_it_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with closing(Progress(1, 0, 1)) as progress:
        progress.update(steps(1, 1)[0])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("step 1/1")


def arrived(terminal: int) -> Iterator[str]:
    """All that was written, by parts, until the other end is closed."""
    with suppress(OSError):
        while part := os.read(terminal, 1 << 16):
            yield part.decode()


@pytest.mark.parametrize("columns", [0, 24, 300])
def test_a_terminal_of_any_width_shows_the_loss(columns: int) -> None:
    """0: it does not know its width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with os.fdopen(theirs, "w") as terminal:
        assert os.get_terminal_size(theirs).columns == columns
        with closing(Progress(20, 0, 10, terminal)) as progress:
            for record in steps(1, 20):
                progress.update(record)
    seen = "".join(arrived(ours))
    os.close(ours)
    assert "loss 2.5000" in seen
    assert max(map(len, re.split(r"[\r\n]", seen))) <= min(columns or 80, 100)
