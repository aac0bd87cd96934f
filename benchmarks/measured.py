"""What the measured programs share: a command line, the memory they grew by, and their result.

Memory is counted above the imports. So that no program is charged for a module that it merely
imports late, `--imports` names the modules of an earlier run, and all are imported before counting.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter, process_time, time

from xtrain.measure.machine import reset_peak_resident, resident_bytes

STARTED = "BENCHMARK_STARTED"


@dataclass(frozen=True)
class Training:
    """One training run, step by step."""

    step_seconds: list[float]
    losses: list[float]
    """Mean over the step's targets."""
    total_seconds: float
    """All steps, and whatever happened between them."""
    cpu_step_seconds: float | None = None
    """CPU time of all threads of the process for a step: the mean over all but the first."""
    startup_seconds: float | None = None
    """From the start of the process to the end of its first step."""


class Clock:
    """Takes down when steps ended, of a program whose loop is somebody else's."""

    def __init__(self) -> None:
        self.wall = [perf_counter()]
        self.cpu: list[float] = []
        """CPU seconds of this process, of all threads, from the first end of a step on."""
        self.first_step_at = 0.0

    def begin(self) -> None:
        """Immediately before the first step."""
        self.wall[0] = perf_counter()

    def step_ended(self) -> None:
        self.wall.append(perf_counter())
        self.cpu.append(process_time())
        if len(self.cpu) == 1:
            self.first_step_at = time()

    def training(self, losses: list[float]) -> Training:
        return Training(
            [end - start for start, end in pairwise(self.wall)],
            losses,
            self.wall[-1] - self.wall[0],
            cpu_step_seconds=(self.cpu[-1] - self.cpu[0]) / max(1, len(self.cpu) - 1),
            startup_seconds=seconds_since_start(self.first_step_at),
        )


def seconds_since_start(moment: float) -> float | None:
    """From the moment this process was asked for (Runner says it) to `moment`; both since the epoch."""
    started = os.environ.get(STARTED)
    return moment - float(started) if started else None


@dataclass(frozen=True)
class Measured:
    """What one process did and took."""

    step_seconds: list[float]
    losses: list[float]
    total_seconds: float
    imports_bytes: int
    """Resident when everything was imported and nothing built."""
    peak_bytes: int
    modules: list[str]
    """Everything that was imported in the end, in that order."""
    cpu_step_seconds: float | None = None
    startup_seconds: float | None = None

    @property
    def growth_bytes(self) -> int:
        return self.peak_bytes - self.imports_bytes


def main(train: Callable[[Path], Training]) -> None:
    """`python -m benchmarks.PROGRAM FOLDER RESULT [--imports FILE]`: train and write a Measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path, help="workload.json, spec.yaml and batches.npy")
    parser.add_argument("result", type=Path, help="where to write the JSON")
    parser.add_argument("--imports", type=Path, help="JSON list of modules to import first")
    arguments = parser.parse_args()
    if arguments.imports:
        import_all(json.loads(arguments.imports.read_text()))
    imports_bytes = resident_bytes().bytes
    reset_peak_resident()
    training = train(arguments.folder)
    peak_bytes = resident_bytes().peak_bytes
    assert peak_bytes is not None
    measured = Measured(
        **asdict(training), imports_bytes=imports_bytes, peak_bytes=peak_bytes, modules=list(sys.modules)
    )
    arguments.result.write_text(json.dumps(asdict(measured)))


def import_all(names: Sequence[str]) -> None:
    """Import what can be imported by name; some entries of sys.modules are made on the fly."""
    for name in names:
        if name != "__main__":
            with contextlib.suppress(Exception):
                importlib.import_module(name)
