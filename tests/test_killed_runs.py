"""A run that is killed again and again, and resumed each time, is the run that was left in peace."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from numpy.typing import NDArray

from tests.clean_process import start
from tests.small_runs import metrics, run, weights
from xtrain.contract import Batch
from xtrain.data import Dataset

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
    process = start(logged_run, folder, out, *words, **options)
    deadline = time.monotonic() + LONGEST_SECONDS
    while process.is_alive() and written(out) - fewest < lines and time.monotonic() < deadline:
        fewest = min(fewest, written(out))
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def logged_run(folder: Path, out: Path, *words: str | Path, **options: Any) -> Result:
    """A run, and a line beside `out` for every batch that it reads: the step, and which sequences."""
    read, read_step = Dataset._batch, Dataset.micro_batches
    ids: list[int] = []

    def noted(self: Dataset, rows: NDArray[np.int64]) -> Batch:
        ids.extend(rows.tolist())
        return read(self, rows)

    def noted_step(self: Dataset, step: int, data_rank: int, data_size: int) -> list[Batch]:
        ids.clear()
        batches = read_step(self, step, data_rank, data_size)
        with out.with_suffix(".ids").open("a") as file:
            file.write(json.dumps([step, ids]) + "\n")
        return batches

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "_batch", noted)
        patch.setattr(Dataset, "micro_batches", noted_step)
        return run(folder, *words, **options)


def sequence_ids(out: Path) -> list[tuple[int, list[int]]]:
    """What `logged_run` noted, in the order of time: a step as often as it was taken."""
    return [(step, ids) for step, ids in map(json.loads, out.with_suffix(".ids").read_text().splitlines())]


def written(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.parametrize("background", ["true", "false"])
def test_twenty_random_kills_change_neither_the_weights_nor_the_log(
    tmp_path: Path, background: str, record_property: Callable[[str, object], None]
) -> None:
    options = {**OPTIONS, "checkpoint": f"{{every_steps: 2, background: {background}}}"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert logged_run(tmp_path, whole, "--out", whole, **options).exit_code == 0
    draw = random.Random(0)
    kills = sum(killed(tmp_path, out, draw.randint(1, 5), options) for _ in range(KILLS))
    assert logged_run(tmp_path, out, "--resume", out, **options).exit_code == 0
    assert kills == KILLS
    taken, expected = sequence_ids(out), sequence_ids(whole)
    assert len(taken) > len(expected) == STEPS  # some steps were taken again
    assert all(one in expected for one in taken)
    assert sorted(dict(taken).items()) == expected
    record_property("kills", kills)
    record_property("steps whose sequence ids are the same", len(taken))
    assert weights(out, STEPS) == weights(whole, STEPS)
    assert [learned(line) for line in metrics(out)] == [learned(line) for line in metrics(whole)]


def learned(line: Any) -> tuple[Any, ...]:
    """All that a line says but times and memory."""
    return line.step, line.loss, line.lr, line.grad_norm, line.tokens, line.skipped
