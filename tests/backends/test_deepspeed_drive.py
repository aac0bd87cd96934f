"""Offload to a drive (ZeRO-Infinity): the same losses, also after a stop, there and elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from backends.deepspeed.nvme import find_libaio
from tests.jobs import ON_THE_CPU, run_job
from xtrain import registry

USABLE = registry.survey()["deepspeed"]
NEEDS = [
    (not USABLE.usable, USABLE.reason),
    (not find_libaio() or shutil.which("g++") is None, "needs: libaio-dev and g++"),
]
pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.skipif(missing, reason=reason) for missing, reason in NEEDS),
]

TOLERANCE = 1e-5
BF16_BAND = 1e-3
"""Relative, losses and norms."""
RUNS = [
    *((1, kind) for kind in ("optimizer", "parameters", "both", "both, bf16")),
    *((2, kind) for kind in ("both", "both, bf16")),
]
EVERY_RUN = pytest.mark.parametrize(("world", "kind"), RUNS)
Reports = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What the worker wrote, by number of processes."""
    return {world: start_job(world, tmp_path_factory.mktemp("drive")) for world in (1, 2)}


def start_job(world: int, folder: Path) -> dict[str, Any]:
    (folder / "nvme").mkdir()
    run_job(world, "tests.backends.drive_worker", folder / "out.json", folder / "nvme", **ON_THE_CPU)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    found["left at the end"] = list((folder / "nvme").iterdir())
    return found


def difference(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def against_plain(column: str, found_in: str, world: int, kind: str, reports: Reports) -> float:
    plain = reports[1]["plain, bf16" if "bf16" in kind else "plain"]
    return difference(reports[world][kind][found_in], plain[column])


def band(kind: str) -> float:
    return BF16_BAND if "bf16" in kind else TOLERANCE


@EVERY_RUN
def test_stopped_and_resumed_on_the_drive_it_is_the_plain_training(
    world: int, kind: str, reports: Reports
) -> None:
    assert against_plain("losses", "losses", world, kind, reports) <= band(kind)
    assert against_plain("norms", "norms", world, kind, reports) <= band(kind)


@EVERY_RUN
def test_state_on_a_drive_moves_to_another_backend(world: int, kind: str, reports: Reports) -> None:
    assert against_plain("losses", "moved", world, kind, reports) <= band(kind)


@EVERY_RUN
def test_it_really_was_on_the_drive_and_the_run_leaves_nothing_there(
    world: int, kind: str, reports: Reports
) -> None:
    assert reports[world][kind]["swapped"] > 10 * 2**20
    assert reports[world][kind]["left"] == reports[world]["left at the end"] == []
