"""A run that is killed again and again, and resumed each time, is the run that was left in peace."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clean_process import start
from tests.small_runs import metrics, run, weights

pytestmark = pytest.mark.slow

KILLS = 20
STEPS = 60
LONGEST_SECONDS = 60
OPTIONS: dict[str, Any] = {
    "backend": "cpu",
    "train__steps": STEPS,
    "model__dropout": 0.1,
    "log__every_steps": 1,
}


def killed(folder: Path, out: Path, lines: int, options: dict[str, Any]) -> bool:
    """Go on with the run in a process of its own until it has written that many lines, and kill it then.

    Returns whether it was killed before it ended.
    """
    fewest = written(out)  # it cuts them after its checkpoint before it writes more
    words = ("--resume", out) if out.exists() else ("--out", out)
    process = start(run, folder, *words, **options)
    deadline = time.monotonic() + LONGEST_SECONDS
    while process.is_alive() and written(out) - fewest < lines and time.monotonic() < deadline:
        fewest = min(fewest, written(out))
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def written(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.parametrize("background", ["true", "false"])
def test_twenty_random_kills_change_neither_the_weights_nor_the_log(
    tmp_path: Path, background: str, record_property: Callable[[str, object], None]
) -> None:
    options = {**OPTIONS, "checkpoint": f"{{every_steps: 2, background: {background}}}"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(tmp_path, "--out", whole, **options).exit_code == 0
    draw = random.Random(0)
    kills = sum(killed(tmp_path, out, draw.randint(1, 5), options) for _ in range(KILLS))
    assert run(tmp_path, "--resume", out, **options).exit_code == 0
    assert kills == KILLS
    record_property("kills", kills)
    assert weights(out, STEPS) == weights(whole, STEPS)
    assert [learned(line) for line in metrics(out)] == [learned(line) for line in metrics(whole)]


def learned(line: Any) -> tuple[Any, ...]:
    """All that a line says but times and memory."""
    return line.step, line.loss, line.lr, line.grad_norm, line.tokens, line.skipped
