"""Runs as they lie on disk, made up: for the tests of what reads records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtrain.records.figures import StepFigures
from xtrain.records.metrics import MetricsLog, StepRecord
from xtrain.records.record import (
    CounterFacts,
    DataFacts,
    ModelFacts,
    RankMemory,
    RunRecord,
    write_record,
)

MIB = 1 << 20
GIB = 1 << 30


def sample_steps(count: int = 20, loss_factor: float = 1.0, seconds: float = 0.5) -> list[StepRecord]:
    """Falling losses; step 6 is traced, the last is evaluated."""
    return [
        StepRecord(
            step=step,
            loss=loss_factor * (2 + 3 * math.exp(-step / 8)),
            lr=1e-3,
            grad_norm=1 / step,
            tokens=1000,
            seconds=seconds,
            skipped=False,
            eval_loss=2.5 if step == count else None,
            spans={"data": 0.05, "forward": 0.15, "backward": 0.25} if step == 6 else None,
        )
        for step in range(1, count + 1)
    ]


def sample_memory(rank: int = 0, live_peak: int | None = 300 * MIB, method: str = "counter") -> RankMemory:
    live = None if live_peak is None else CounterFacts(bytes=MIB, peak_bytes=live_peak, method=method)  # type: ignore[arg-type]
    resident = CounterFacts(bytes=GIB, peak_bytes=2 * GIB, method="counter")
    return RankMemory(rank=rank, live=live, reserved=None, rss=resident, categories=None)


def sample_record(steps: Sequence[StepRecord] | None = None, **changes: Any) -> RunRecord:
    steps = sample_steps() if steps is None else steps
    figures = StepFigures(steps, start=0, warmup_steps=3)
    values: dict[str, Any] = {
        "status": "done",
        "backend": "cpu",
        "world": 1,
        "spec": {
            "train": {"steps": 20},
            "model": {"dropout": 0.0},
            "precision": {"dtype": "fp32", "weights": "fp32"},
        },
        "settings": {},
        "notes": [],
        "environment": {"python": "3.11.0", "packages": {"torch": "2.13.0"}},
        "threads": 1,
        "matmul_precision": "highest",
        "data": DataFacts(description="synthetic, 1,000,000 tokens", hash="abc", portable=True),
        "model": ModelFacts(description="gpt2-nano", parameters=1_000_000),
        "totals": figures.totals(seconds=10.0),
        "loss": figures.loss(),
        "eval": figures.evaluation,
        "speed": figures.speed.speed(),
        "time_split": figures.time_split.split(),
        "memory": [sample_memory()],
    }
    return RunRecord(**{**values, **changes})


def write_run(directory: Path, steps: Sequence[StepRecord] | None = None, **changes: Any) -> Path:
    """A run directory as far as reports look into it."""
    steps = sample_steps() if steps is None else steps
    directory.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(directory / "metrics.jsonl")
    for step in steps:
        log.append(step)
    log.close()
    write_record(directory / "record.json", sample_record(steps, **changes))
    return directory
