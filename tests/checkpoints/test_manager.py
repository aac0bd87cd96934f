from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.test_format import state
from xtrain import registry
from xtrain.checkpoints import manager, saving
from xtrain.checkpoints import select as selecting
from xtrain.checkpoints.format import MANIFEST, Checkpoint, CheckpointError, Damaged, complete_checkpoints
from xtrain.checkpoints.manager import Checkpointer
from xtrain.checkpoints.select import select, set_aside_after
from xtrain.checkpoints.writer import write
from xtrain.contract import Engine, Job
from xtrain.errors import RunFailed
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec

MINIMAL = {
    "model": {"preset": "gpt2-nano"},
    "data": {"source": "synthetic"},
    "batch": {"global": 4},
    "train": {"steps": 100},
    "optimizer": {"lr": 1e-3},
}


class Saver:
    """A checkpointer at work on the null engine, and what it said."""

    def __init__(self, folder: Path, **section: Any) -> None:
        self.said: list[str] = []
        self.synced = 0
        spec = Spec.model_validate({**MINIMAL, "checkpoint": section})
        backend = registry.load("null")
        resolved = backend.resolve(spec, 1)
        self.engine: Engine = backend.start(resolved, model_source(spec, 257), Job())
        self.checkpointer = Checkpointer(
            spec.checkpoint, resolved, "abc", None, folder, self.said.append, self._sync
        )

    def _sync(self) -> None:
        self.synced += 1

    def save(self, *steps: int, last: bool = False) -> None:
        for step in steps:
            self.checkpointer.save(self.engine, step, last)


def found(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in complete_checkpoints(folder)]


def test_the_oldest_by_step_number_are_removed(tmp_path: Path) -> None:
    Saver(tmp_path, keep=2).save(999, 1000, 10_000)
    assert found(tmp_path) == [1000, 10_000]


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(5, 5)
    assert saver.synced == 1


def test_due_every_so_many_updates_counted_from_the_first() -> None:
    due = Saver(Path(), every_steps=4).checkpointer.due
    assert [step for step in range(1, 13) if due(step)] == [4, 8, 12]
    assert not Saver(Path()).checkpointer.due(4)


def test_minutes_are_counted_from_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(manager, "monotonic", lambda: now[0])
    saver = Saver(tmp_path, every_minutes=2)
    overdue = saver.checkpointer.overdue
    now[0] += 119
    assert not overdue(saver.engine)
    now[0] += 1
    assert overdue(saver.engine)
    saver.save(3)
    assert not overdue(saver.engine)
    assert not Saver(tmp_path).checkpointer.overdue(saver.engine)


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1, best=True)
    for step, loss in ((1, 3.0), (2, 2.0), (3, float("nan")), (4, 2.0), (5, None), (6, 2.5)):
        saver.checkpointer.evaluated(step, loss)
        saver.save(step)
    assert found(tmp_path) == [2, 6]
    assert complete_checkpoints(tmp_path)[-1].state().best == (2, 2.0)


def test_a_best_that_nobody_asked_for_is_not_kept(tmp_path: Path) -> None:
    saver = Saver(tmp_path, keep=1)
    saver.checkpointer.evaluated(1, 1.0)
    saver.save(1, 2)
    assert found(tmp_path) == [2]


@pytest.fixture
def broken_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "commit", full)


FAILED = "checkpoint {} was not saved: No space left on device"


@pytest.mark.parametrize("last", [False, True])
def test_an_old_one_that_cannot_be_deleted_is_told_and_the_new_one_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    def refuse(checkpoint: Checkpoint) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(checkpoint.path))

    saver = Saver(tmp_path, keep=1, on_error="stop")
    saver.save(5)
    monkeypatch.setattr(selecting, "remove", refuse)
    saver.save(6, last=last)
    assert saver.said == [
        f"warning: an older checkpoint could not be deleted: {tmp_path}/step-00000005: Permission denied"
    ]
    assert found(tmp_path) == [5, 6]


@pytest.mark.usefixtures("broken_disk")
def test_a_failed_save_is_told_and_training_goes_on(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(5)
    message = FAILED.format(tmp_path / "step-00000005")
    assert saver.said == [f"warning: {message}; there is no earlier one, training goes on"]
    write(tmp_path, state(4), {})
    saver.save(6)
    message = FAILED.format(tmp_path / "step-00000006")
    assert saver.said[1:] == [f"warning: {message}; earlier ones are intact, training goes on"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.usefixtures("broken_disk")
def test_a_failed_save_ends_the_run_where_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RunFailed) as caught:
        Saver(tmp_path, on_error="stop").save(5)
    message = FAILED.format(tmp_path / "step-00000005")
    assert str(caught.value) == f"{message} (checkpoint.on_error is stop); there is no earlier one"


@pytest.mark.usefixtures("broken_disk")
@pytest.mark.parametrize("on_error", ["continue", "stop"])
def test_a_last_save_that_failed_is_a_failed_run(tmp_path: Path, on_error: str) -> None:
    """Nothing is left to go on with; "saved" must not be said of it."""
    with pytest.raises(RunFailed, match="and it was the last; there is no earlier one"):
        Saver(tmp_path, on_error=on_error).save(5, last=True)


def test_a_run_directory_means_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (20, 100):
        write(folder, state(step), {})
    (folder / ".step-00000300.1").mkdir()
    assert select(tmp_path, hashes=True).checkpoint == Checkpoint(folder / "step-00000100", 100)
    assert select(folder / "step-00000020", hashes=True).checkpoint == Checkpoint(
        folder / "step-00000020", 20
    )


def test_a_run_directory_without_a_checkpoint_has_none(tmp_path: Path) -> None:
    assert select(tmp_path, hashes=True).checkpoint is None


def damaged(folder: Path, *steps: int) -> None:
    for step in steps:
        write(folder, state(step), {})
        (folder / f"step-{step:08d}" / MANIFEST).write_text("{}")


def test_damaged_ones_are_passed_over_and_named_newest_first(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, state(10), {})
    damaged(folder, 20, 30)
    found = select(tmp_path, hashes=False)
    assert found.checkpoint == Checkpoint(folder / "step-00000010", 10)
    assert [checkpoint.step for checkpoint, _ in found.damaged] == [30, 20]
    assert f"{folder}/step-00000030/manifest.json is damaged" in found.damaged[0][1]


def test_a_run_directory_that_holds_only_damaged_ones_is_refused_with_a_way_forward(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    damaged(folder, 20, 30)
    with pytest.raises(CheckpointError) as caught:
        select(tmp_path, hashes=True)
    first, *listed, last = str(caught.value).splitlines()
    assert first == f"every checkpoint of {tmp_path} is damaged:"
    assert [line.split("/manifest")[0] for line in listed] == [
        f"  {folder}/step-00000030",
        f"  {folder}/step-00000020",
    ]
    assert last == f"  To train again from step 0, move {folder} away and resume"


def test_a_damaged_one_that_was_named_is_an_error_with_the_one_before_it(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    damaged(folder, 20)
    with pytest.raises(Damaged, match=r"; there is none before it$"):
        select(folder / "step-00000020", hashes=True)
    write(folder, state(10), {})
    with pytest.raises(Damaged, match=rf"; the one before it: --resume {folder}/step-00000010$"):
        select(folder / "step-00000020", hashes=True)


def test_a_damaged_one_does_not_count_as_kept_and_is_not_deleted(tmp_path: Path) -> None:
    write(tmp_path, state(10), {})
    damaged(tmp_path, 20)
    Saver(tmp_path, keep=2).save(30)
    assert found(tmp_path) == [10, 20, 30]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "missing: not there; expected a run directory"),
        ("file", "file: a file; expected a run directory"),
        ("step-12", "step-12 is not a checkpoint"),
    ],
)
def test_what_is_no_run_and_no_checkpoint_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "step-12").mkdir()
    with pytest.raises(CheckpointError, match=message):
        select(tmp_path / name, hashes=False)


def test_a_run_named_like_a_checkpoint_is_found_also_by_its_checkpoints_folder(
    tmp_path: Path,
) -> None:
    out = tmp_path / "step-lr"
    write(out / "checkpoints", state(10), {})
    for place in (out, out / "checkpoints"):
        found = select(place, hashes=True).checkpoint
        assert found is not None
        assert found.step == 10


def test_later_checkpoints_are_set_aside_and_earlier_ones_stay(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, state(step), {})
    assert set_aside_after(tmp_path, 30) is None
    assert set_aside_after(tmp_path, 20) == tmp_path / "superseded-1"
    assert set_aside_after(tmp_path, 10) == tmp_path / "superseded-2"
    assert found(tmp_path) == [10]
    assert (found(tmp_path / "superseded-1"), found(tmp_path / "superseded-2")) == ([30], [20])
