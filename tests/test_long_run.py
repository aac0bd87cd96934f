"""A run that one would leave running overnight, in small: 2,000 updates in which nothing grows."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import SPEC, checkpoints, metrics
from xtrain.records.metrics import StepRecord
from xtrain.records.record import load_record

STEPS = 2000
WINDOW = 10
ALLOWED_GROWTH_BYTES = 4 << 20
"""Over the last thousand updates. Measured: 0 to 1 MiB; a leak of 8 KiB per update would be twice as much."""


@pytest.mark.slow
def test_memory_stays_flat_and_every_update_is_written_down(tmp_path: Path) -> None:
    spec, out = tmp_path / "spec.yaml", tmp_path / "out"
    spec.write_text(SPEC)
    sets = {
        "train.steps": STEPS,
        "train.eval_every": 250,
        "checkpoint.every_steps": 200,
        "checkpoint.keep": 2,
        "stability": "{loss_spike: 5}",
        "log.every_steps": WINDOW,
    }
    words = ["--backend", "cpu", "--out", out, *(f"--set={key}={value}" for key, value in sets.items())]
    command = [sys.executable, "-m", "xtrain", "run", str(spec), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr

    lines = metrics(out)
    assert [line.step for line in lines] == list(range(1, STEPS + 1))
    assert all(line.loss is not None and line.grad_norm is not None and line.seconds for line in lines)
    assert [line.step for line in lines if line.eval_loss is not None] == list(range(250, STEPS + 1, 250))
    assert checkpoints(out) == [1800, 2000]
    assert load_record(out).totals.steps == STEPS

    sampled = [(line.step, line.rss_bytes) for line in lines if line.rss_bytes is not None]
    assert {step for step, _ in sampled} >= set(range(WINDOW, STEPS + 1, WINDOW))
    half = [(step, size) for step, size in sampled if step > STEPS // 2]
    growth_bytes = statistics.linear_regression(*zip(*half, strict=True)).slope * len(lines) / 2
    print(f"growth {growth_bytes / 2**20:.2f} MiB; step, first half to second: {_pace(lines)}")
    assert abs(growth_bytes) < ALLOWED_GROWTH_BYTES


def _pace(lines: list[StepRecord]) -> str:
    """For people: a test does not depend on how busy a machine is."""
    halves = lines[: STEPS // 2], lines[STEPS // 2 :]
    first, second = (statistics.median(line.seconds or 0.0 for line in half) for half in halves)
    return f"{first * 1e3:.2f} ms to {second * 1e3:.2f} ms (medians)"
