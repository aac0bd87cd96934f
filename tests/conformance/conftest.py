"""Starts the workers: one process for every lane with one, two under torch.distributed.run for the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.cases import Case
from tests.conformance.environment import ROOT, job_environment

TIMEOUT_SECONDS = 600

Results = dict[str, Any]
RunCases = Callable[[Sequence[Case], int], tuple[Results, Path]]


@pytest.fixture(scope="session")
def run_cases(tmp_path_factory: pytest.TempPathFactory) -> RunCases:
    """Runs cases in a fresh job of `world` processes; returns results by name and the weights' folder."""

    def run(cases: Sequence[Case], world: int) -> tuple[Results, Path]:
        out = tmp_path_factory.mktemp("conformance")
        described = out / "cases.json"
        described.write_text(json.dumps([case.described() for case in cases]))
        module = ["-m", "tests.conformance.worker", str(described), str(out)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [sys.executable, *(launcher if world > 1 else []), *module]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=job_environment(world),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((out / "results.json").read_text()), out

    return run
