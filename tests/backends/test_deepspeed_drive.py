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

BANDS = {"losses": 1e-5, "norms": 1e-4}
"""Relative, in fp32. Norms (measured: 2.4e-5) are wider: AdamW's first update makes a whole step of what is
only a gradient's rounding."""
BF16_BANDS = {"losses": 1e-3, "norms": 1e-3}
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


def is_plain(found: list[float], column: str, kind: str, reports: Reports) -> bool:
    """Whether these are the losses, or norms, of the training with nothing on a drive."""
    plain, bands = ("plain, bf16", BF16_BANDS) if "bf16" in kind else ("plain", BANDS)
    return difference(found, reports[1][plain][column]) <= bands[column]


@EVERY_RUN
def test_stopped_and_resumed_on_the_drive_it_is_the_plain_training(
    world: int, kind: str, reports: Reports
) -> None:
    run = reports[world][kind]
    assert is_plain(run["losses"], "losses", kind, reports)
    assert is_plain(run["norms"], "norms", kind, reports)


@EVERY_RUN
def test_state_on_a_drive_moves_to_another_backend(world: int, kind: str, reports: Reports) -> None:
    assert is_plain(reports[world][kind]["moved"], "losses", kind, reports)


@EVERY_RUN
def test_it_really_was_on_the_drive_and_the_run_leaves_nothing_there(
    world: int, kind: str, reports: Reports
) -> None:
    assert reports[world][kind]["swapped"] > 10 * 2**20
    assert reports[world][kind]["left"] == reports[world]["left at the end"] == []
