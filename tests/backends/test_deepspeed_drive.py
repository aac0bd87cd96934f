"""Offload to a drive (ZeRO-Infinity): the same losses, also after a stop, there and elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.environment import ROOT, job_environment
from xtrain import registry

USABLE = registry.survey()["deepspeed"]
NEEDS = [
    (not USABLE.usable, USABLE.reason),
    (find_library("aio") is None or shutil.which("g++") is None, "needs libaio-dev and g++"),
]
pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.skipif(missing, reason=reason) for missing, reason in NEEDS),
]

TOLERANCE = 1e-5
TIMEOUT_SECONDS = 540
"""The first time DeepSpeed compiles its operator, which takes minutes on a small machine."""
KINDS = ("optimizer", "parameters", "both")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("drive")
    (folder / "nvme").mkdir()
    program = ["-m", "tests.backends.drive_worker", str(folder / "out.json")]
    environment = {**job_environment(1), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, *program, str(folder / "nvme")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(Path(folder / "out.json").read_text())
    return found


def difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_stopped_and_resumed_on_the_drive_it_is_the_plain_training(kind: str, report: dict[str, Any]) -> None:
    assert difference(report[kind]["losses"], report["plain"]) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_state_on_a_drive_moves_to_another_backend(kind: str, report: dict[str, Any]) -> None:
    assert difference(report[kind]["moved"], report["plain"]) <= TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_it_really_was_on_the_drive_and_the_run_leaves_nothing_there(
    kind: str, report: dict[str, Any]
) -> None:
    assert report[kind]["swapped"] > 10 * 2**20
    assert report[kind]["left"] == []
