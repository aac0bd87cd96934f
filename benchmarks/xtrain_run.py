"""`xtrain run` on a workload, in this process, so that its memory can be counted above the imports.

Which backend: the environment variable BENCHMARK_BACKEND. BENCHMARK_SETTINGS holds what `--set` is to
change, as a JSON object of dotted keys and values. Speed and losses come from metrics.jsonl, the
seconds of all training from record.json.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import measured
from xtrain.cli import main
from xtrain.collection import collect_later
from xtrain.records.metrics import StepRecord
from xtrain.records.recorder import Recorder

assert torch  # the command imports it late; here it belongs to the imports


def train(folder: Path) -> measured.Training:
    backend, out = os.environ["BENCHMARK_BACKEND"], folder / f"run-{os.getpid()}"
    settings = json.loads(os.environ.get("BENCHMARK_SETTINGS", "{}"))
    changed = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    clock, saw = measured.Clock(), Recorder.saw
    collect_later()  # as the command does

    def timed(recorder: Recorder, record: StepRecord) -> None:
        clock.step_ended()
        saw(recorder, record)

    try:
        with patch.object(Recorder, "saw", timed):
            main(["run", str(folder / "spec.yaml"), "--backend", backend, "--out", str(out), *changed])
    except SystemExit as end:
        if end.code:
            raise
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return replace(
        clock.training([row["loss"] for row in rows]),
        step_seconds=[row["seconds"] for row in rows],  # records come a window at a time
        total_seconds=json.loads((out / "record.json").read_text())["totals"]["seconds"],
    )


if __name__ == "__main__":
    measured.main(train)
