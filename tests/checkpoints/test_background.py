"""Saves in the background: training waits for the copy alone, and nothing that goes wrong is lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from backends.null.backend import NullEngine
from tests.checkpoints.test_manager import MINIMAL, found
from xtrain import registry
from xtrain.checkpoints.format import complete_checkpoints
from xtrain.checkpoints.manager import Checkpointer
from xtrain.contract import JSON, StateForm, StateKey, StatePiece
from xtrain.errors import RunFailed
from xtrain.spec.tree import Spec


class OneWeight(NullEngine):
    """An engine with one weight, whose memory a save may not look at later."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.gathered = 0
        """How often the ranks would have waited for each other."""

    def gather(self, value: JSON) -> list[JSON]:
        self.gathered += 1
        return super().gather(value)

    def state_layout(self) -> dict[StateKey, StateForm]:
        return {("w", "weight"): StateForm((4,))}

    def export_state(self, owner: Callable[[str], int]) -> Iterator[StatePiece]:
        yield StatePiece("w", "weight", self.weight)


class Saver:
    """A checkpointer at work, whose thread waits at `gate` before it commits."""

    def __init__(self, folder: Path, **section: Any) -> None:
        self.said: list[str] = []
        self.folder = folder
        self.gate, self.arrived = Event(), Event()
        self.weight = torch.zeros(4)
        self.engine = OneWeight(self.weight)
        spec = Spec.model_validate({**MINIMAL, "checkpoint": {"background": True, **section}})
        resolved = registry.load("null").resolve(spec, 1)
        self.checkpointer = Checkpointer(
            spec.checkpoint, resolved, "abc", None, folder, self.said.append, self._wait
        )

    def _wait(self) -> None:
        self.arrived.set()
        assert self.gate.wait(30)

    def save(self, step: int, last: bool = False) -> None:
        self.checkpointer.save(self.engine, step, last)

    def break_the_disk(self) -> None:
        """What is being written is gone, as when a disk is pulled; the gate is then opened."""
        assert self.arrived.wait(30)
        for partial in self.folder.glob(".step-*"):
            shutil.rmtree(partial)
        self.gate.set()
        writing = self.checkpointer.writing
        assert writing is not None
        writing.join(30)

    def saved_weight(self, step: int) -> list[float]:
        (checkpoint,) = [one for one in complete_checkpoints(self.folder) if one.step == step]
        weight = checkpoint.reader().read("w", "weight")
        assert weight is not None
        return weight.tolist()


def test_training_goes_on_while_a_save_is_written_and_changes_nothing_in_it(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1)
    saver.weight += 1
    assert found(tmp_path) == []
    saver.gate.set()
    saver.save(2, last=True)
    assert found(tmp_path) == [1, 2]
    assert (saver.saved_weight(1), saver.saved_weight(2)) == ([0.0] * 4, [1.0] * 4)


@pytest.mark.parametrize("waits", [False, True])
def test_what_was_saved_is_known_without_a_look_at_the_disk(tmp_path: Path, waits: bool) -> None:
    """Whether the next save found it done, or waited for it; a save that failed is not one."""
    saver = Saver(tmp_path)
    saver.save(1)
    saver.break_the_disk()
    saver.save(2)
    assert not saver.checkpointer.has_saved
    if not waits:
        assert saver.checkpointer.writing is not None
        saver.checkpointer.writing.join(30)
    saver.save(3)
    assert saver.checkpointer.has_saved
    saver.checkpointer.close()


def test_the_copy_is_made_into_the_memory_of_the_save_before(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.gate.set()
    saver.save(1)
    kept = [tensor.data_ptr() for tensor in saver.checkpointer.buffers._kept.values()]
    saver.save(2, last=True)
    assert [tensor.data_ptr() for tensor in saver.checkpointer.buffers._kept.values()] == kept
    assert saver.checkpointer.buffers.bytes == 16


def test_a_save_after_one_that_has_ended_has_ranks_wait_for_each_other_twice(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.gate.set()
    saver.save(1)
    writing = saver.checkpointer.writing
    assert writing is not None
    writing.join(30)
    saver.engine.gathered = 0
    saver.save(2)
    assert saver.engine.gathered == 2  # has the last one ended well, and where does this one go?
    saver.save(3, last=True)
    assert found(tmp_path) == [1, 2, 3]


def test_the_next_save_waits_for_the_one_before(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1)
    first = saver.checkpointer.writing
    assert first is not None
    assert first.is_alive()
    saver.gate.set()
    saver.save(2)
    assert not first.is_alive()
    assert 1 in found(tmp_path)
    saver.checkpointer.close()


def test_leaving_after_an_error_lets_a_save_end(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1)
    saver.gate.set()
    saver.checkpointer.close()
    assert found(tmp_path) == [1]


def test_a_save_that_failed_is_told_once_after_the_next_step_and_training_goes_on(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.save(1)
    assert not saver.checkpointer.failed_since()
    assert saver.said == []
    saver.break_the_disk()
    for _ in range(2):
        assert not saver.checkpointer.failed_since()
    assert len(saver.said) == 1
    assert saver.said[0].startswith(f"warning: checkpoint {tmp_path}/step-00000001 was not saved: ")
    saver.save(2, last=True)
    assert len(saver.said) == 1
    assert found(tmp_path) == [2]


def test_a_save_that_failed_ends_the_run_where_that_was_asked_for(tmp_path: Path) -> None:
    saver = Saver(tmp_path, on_error="stop")
    saver.save(1)
    saver.break_the_disk()
    assert saver.checkpointer.failed_since()
    with pytest.raises(RunFailed, match=r"step-00000001 was not saved: .*\(checkpoint.on_error is stop\)"):
        saver.save(2, last=True)
    assert found(tmp_path) == []


def test_a_last_save_that_failed_is_a_failed_run(tmp_path: Path) -> None:
    saver = Saver(tmp_path)
    saver.gate.set()
    saver.save(1, last=True)
    saver.gate.clear()
    saver.checkpointer.before_commit = lambda: shutil.rmtree(next(tmp_path.glob(".step-*")))
    with pytest.raises(
        RunFailed, match=r"step-00000002 was not saved: .*, and it was the last; earlier ones"
    ):
        saver.save(2, last=True)
    assert found(tmp_path) == [1]
