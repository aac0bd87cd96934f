"""SIGKILL at every phase of a save: what is found afterwards is whole, and the newest that was finished."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.killed_writer import save_and_die, tensors
from tests.checkpoints.test_format import state
from tests.clean_process import start
from xtrain.checkpoints.select import select
from xtrain.checkpoints.writer import write

pytestmark = pytest.mark.slow

NEVER = 10_000
STEP = 3
"""The save that is killed; two were finished before."""


def killed(folder: Path, kill_event: int) -> int:
    """The exit code of a writer in a process of its own."""
    folder.mkdir()
    process = start(save_and_count, folder, kill_event)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def save_and_count(folder: Path, kill_event: int) -> None:
    (folder / "count").write_text(str(save_and_die(folder / "checkpoints", STEP, kill_event)))


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
        selected = select(folder, hashes=True)
        assert not selected.damaged
        checkpoint = selected.checkpoint
        assert checkpoint is not None
        reader = checkpoint.reader()
        for name, kind in tensors(0):
            tensor = reader.read(name, kind)
            assert tensor is not None
            assert set(tensor.tolist()) == {float(checkpoint.step)}
        found.append(checkpoint.step)
        assert_the_next_save_succeeds(folder)
    # The one before until the rename, the new one from then on: never anything else.
    assert found == sorted(found)
    assert set(found) == {STEP - 1, STEP}
    record_property("kills", len(found))


def assert_the_next_save_succeeds(folder: Path) -> None:
    checkpoint = write(folder / "checkpoints", state(STEP + 1), tensors(STEP + 1))
    checkpoint.check(hashes=True)
    assert [path.name for path in checkpoint.path.parent.glob(".step-*")] == []
