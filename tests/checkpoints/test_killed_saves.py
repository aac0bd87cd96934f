"""SIGKILL at every phase of a save: what is found afterwards is whole, and the newest that was finished."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.killed_writer import replace_and_die, save_and_die, tensors
from tests.checkpoints.test_format import state
from tests.clean_process import start
from xtrain.checkpoints.select import select
from xtrain.checkpoints.writer import write

pytestmark = pytest.mark.slow

NEVER = 10_000
STEP = 3
"""The save that is killed; two were finished before."""


def killed(folder: Path, kill_event: int, writer: Callable[[Path, int, int], int] = save_and_die) -> int:
    """The exit code of a writer in a process of its own."""
    folder.mkdir()
    process = start(write_and_count, folder, kill_event, writer)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def write_and_count(folder: Path, kill_event: int, writer: Callable[[Path, int, int], int]) -> None:
    (folder / "count").write_text(str(writer(folder / "checkpoints", STEP, kill_event)))


def the_value_of_all(folder: Path) -> tuple[int, float]:
    """Step of the newest valid checkpoint, and what all of its tensors are filled with."""
    selected = select(folder, hashes=True)
    assert not selected.damaged
    checkpoint = selected.checkpoint
    assert checkpoint is not None
    values: set[float] = set()
    for name, kind in tensors(0):
        tensor = checkpoint.reader().read(name, kind)
        assert tensor is not None
        values |= set(tensor.tolist())
    (value,) = values
    return checkpoint.step, value


def test_a_save_killed_at_any_moment_leaves_the_newest_whole_one_and_is_no_obstacle(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert killed(tmp_path / "whole", NEVER) == 0
    events = int((tmp_path / "whole" / "count").read_text())
    assert events >= 50
    found: list[int] = []
    for event in range(events):
        folder = tmp_path / str(event)
        assert killed(folder, event) == -signal.SIGKILL
        step, value = the_value_of_all(folder)
        assert step == value
        found.append(step)
        assert_the_next_save_succeeds(folder)
    # The one before until the rename, the new one from then on: never anything else.
    assert found == sorted(found)
    assert set(found) == {STEP - 1, STEP}
    record_property("kills", len(found))


def test_a_save_killed_while_it_replaces_one_of_its_step_leaves_the_old_or_the_new_one(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert killed(tmp_path / "whole", NEVER, replace_and_die) == 0
    events = int((tmp_path / "whole" / "count").read_text())
    found: list[float] = []
    for event in range(events):
        folder = tmp_path / str(event)
        assert killed(folder, event, replace_and_die) == -signal.SIGKILL
        step, value = the_value_of_all(folder)
        assert step == STEP
        found.append(value)
        assert_the_next_save_succeeds(folder)
        assert select(folder / "checkpoints" / f"step-{STEP:08d}", hashes=True).checkpoint is not None
    assert found == sorted(found)
    assert found[:2] == [1, 1]  # before the old one moves, and before the new one has its name
    assert found[-1] == 2
    record_property("kills", len(found))


def assert_the_next_save_succeeds(folder: Path) -> None:
    checkpoint = write(folder / "checkpoints", state(STEP + 1), tensors(STEP + 1))
    checkpoint.check(hashes=True)
    assert [path.name for path in checkpoint.path.parent.glob(".step-*")] == []
