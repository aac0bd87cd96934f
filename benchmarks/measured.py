"""What the measured programs share: a command line, the memory they grew by, and their result.

Memory is counted above the imports. So that no program is charged for a module that it merely
imports late, `--imports` names the modules of an earlier run, and all are imported before counting.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from xtrain.machine import reset_peak_resident, resident_bytes


@dataclass(frozen=True)
class Training:
    """One training run, step by step."""

    step_seconds: list[float]
    losses: list[float]
    """Mean over the step's targets."""
    total_seconds: float
    """All steps, and whatever happened between them."""


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
