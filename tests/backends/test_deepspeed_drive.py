"""Offload to a drive (ZeRO-Infinity): the same losses, also after a stop, there and elsewhere."""

from __future__ import annotations

import json
import shutil
from ctypes.util import find_library
from typing import Any

import pytest

from tests.jobs import ON_THE_CPU, run_job
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
KINDS = ("optimizer", "parameters", "both")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("drive")
    (folder / "nvme").mkdir()
    run_job(1, "tests.backends.drive_worker", folder / "out.json", folder / "nvme", **ON_THE_CPU)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
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
