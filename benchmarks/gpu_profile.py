"""Which kernels a step consists of: `xtrain run` with torch's profiler around a few of its steps.

    python -m benchmarks.gpu_profile run SPEC.yaml --backend cuda --out FOLDER

The last line that it prints is a JSON object: `step_seconds`, `busy` (the share of them in which the device
computed, by the sum of its kernels) and `kernels`, the longest first: name, calls and milliseconds of a step.
Nothing is saved.
"""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from xtrain.checkpoints.manager import Checkpointer
from xtrain.cli import main
from xtrain.loop import Loop

FIRST, STEPS = 6, 2
"""After everything was compiled and allocated, and not traced by xtrain itself (xtrain/measure/trace.py)."""
MOST_KERNELS = 40
NAME_LENGTH = 100


class ProfiledSteps:
    """Stands in for Loop._step."""

    def __init__(self) -> None:
        self.on_gpu = torch.cuda.is_available()
        kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if self.on_gpu else [ProfilerActivity.CPU]
        self.profiler, self.alone = profile(activities=kinds), Loop._step
        self.began, self.seconds = 0.0, 0.0

    def __call__(self, loop: Loop, step: int, *rest: Any) -> None:
        if step == FIRST:
            self.profiler.start()
            loop.engine.synchronize()
            self.began = perf_counter()
        self.alone(loop, step, *rest)
        if step == FIRST + STEPS - 1:
            loop.engine.synchronize()
            self.seconds = perf_counter() - self.began
            self.profiler.stop()

    def found(self) -> dict[str, Any]:
        device = "CUDA" if self.on_gpu else "CPU"
        events = [
            event
            for event in self.profiler.key_averages()
            if event.device_type.name == device and not event.is_user_annotation  # that is around kernels
        ]
        milliseconds = {
            event.key: (event.self_device_time_total if self.on_gpu else event.self_cpu_time_total)
            / 1e3
            / STEPS
            for event in events
        }
        calls = {event.key: event.count / STEPS for event in events}
        longest = sorted(milliseconds, key=lambda name: -milliseconds[name])[:MOST_KERNELS]
        return {
            "step_seconds": self.seconds / STEPS,
            "busy": sum(milliseconds.values()) / 1e3 / (self.seconds / STEPS),
            "kernels": [(name[:NAME_LENGTH], calls[name], milliseconds[name]) for name in longest],
        }


if __name__ == "__main__":
    steps = ProfiledSteps()
    with patch.object(Loop, "_step", lambda *given: steps(*given)), patch.object(Checkpointer, "save"):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
    print(json.dumps(steps.found()))
