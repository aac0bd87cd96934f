"""Lanes of made-up runs, for the tests of reports: what a test wants to differ is an argument."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.sample_runs import MIB, sample_memory, sample_record
from xtrain.records.metrics import StepRecord
from xtrain.records.record import RankMemory, StepPeaks
from xtrain.report.build import compare_lanes
from xtrain.report.comparison import Comparison, Figures
from xtrain.report.runs import LaneRuns, Run
from xtrain.rungs import LadderPlace

STEP = {"parameters": 40, "gradients": 40, "optimizer": 80, "activations": 120, "logits": 20}
"""MiB by category."""


def steps(
    count: int = 60, lr: float = 1e-3, seconds: float = 0.1, shake: float = 0.0, warmup: int = 5
) -> list[StepRecord]:
    """A run of plain descent, by formula: the loss falls by what the learning rates so far add up to.

    `shake` is the relative spread of the seconds, the same wobble every time.
    """
    found, travelled = [], 0.0
    for step in range(1, count + 1):
        rate = lr * min(1.0, (step - 1) / warmup)
        found.append(
            StepRecord(
                step=step,
                loss=2 + 3.5 * math.exp(-40 * travelled),
                lr=rate,
                grad_norm=1 / step,
                tokens=1000,
                seconds=seconds * (1 + shake * math.sin(2.4 * step)),
                skipped=False,
                live_bytes=200 * MIB if step % 10 == 0 else None,
                rss_bytes=(400 + step) * MIB if step % 10 == 0 else None,
                spans={"data": 0.002, "forward": 0.03, "backward": 0.06, "optimizer": 0.005}
                if step == 6
                else None,
            )
        )
        travelled += rate
    return found


def memory(megabytes: Mapping[str, int] = STEP) -> RankMemory:
    peaks = {"cpu": {name: count * MIB for name, count in megabytes.items()}}
    return sample_memory().model_copy(update={"step_peaks": StepPeaks(step=2, peaks=peaks)})


SPEC: dict[str, Any] = {
    "model": {"preset": "gpt2-nano", "dropout": 0.0},
    "data": {"source": "synthetic", "seq_len": 125},
    "batch": {"global": 8, "micro": 8},
    "optimizer": {"name": "adamw", "lr": 1e-3},
    "precision": {"dtype": "fp32", "weights": "fp32"},
    "memory": {"checkpointing": "none"},
    "train": {"steps": 60},
}


def run(taken: Sequence[StepRecord] | None = None, **changes: Any) -> Run:
    taken = steps() if taken is None else list(taken)
    values = {"spec": SPEC, "memory": [memory()], **changes}
    return Run(sample_record(taken, **values), list(taken))


def slowed(taken: Sequence[StepRecord], factor: float) -> list[StepRecord]:
    return [replace(step, seconds=(step.seconds or 0) * factor) for step in taken]


def lane(name: str, *runs: Run) -> LaneRuns:
    return LaneRuns(name, "finished", None, runs or (run(),))


def on_rung(lane: LaneRuns, rung: int, ladder: str) -> LaneRuns:
    return replace(lane, place=LadderPlace(ladder, rung))


def unfinished(name: str, reason: str, outcome: Any = "failed") -> LaneRuns:
    return LaneRuns(name, outcome, reason, [])


def compared(*lanes: LaneRuns) -> Comparison:
    return compare_lanes("tiny.yaml", lanes)


def verdict(comparison: Comparison, topic: str) -> Any:
    (found,) = [verdict for verdict in comparison.verdicts if verdict.topic == topic]
    return found


def figures(comparison: Comparison, name: str) -> Figures:
    found = dict(comparison.finished)[name]
    assert isinstance(found, Figures)
    return found
