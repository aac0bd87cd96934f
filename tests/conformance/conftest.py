"""Starts the workers: one process for every lane with one, two under torch.distributed.run for the others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.cases import Case
from tests.jobs import run_job

Results = dict[str, Any]
RunCases = Callable[[Sequence[Case], int], tuple[Results, Path]]


def run_in(folder: Path, cases: Sequence[Case], world: int) -> tuple[Results, Path]:
    """Cases in a fresh job of `world` processes; their results by name, and the weights' folder."""
    out = folder / f"cases-x{world}"
    out.mkdir()
    described = out / "cases.json"
    described.write_text(json.dumps([case.described() for case in cases]))
    run_job(world, "tests.conformance.worker", described, out)
    return json.loads((out / "results.json").read_text()), out


@pytest.fixture(scope="session")
def run_cases(tmp_path_factory: pytest.TempPathFactory) -> RunCases:
    return lambda cases, world: run_in(tmp_path_factory.mktemp("conformance"), cases, world)
