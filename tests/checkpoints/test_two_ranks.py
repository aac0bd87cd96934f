"""Two ranks save in the background, here two threads: they agree on how each save ended, in few rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event
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

PATIENCE_SECONDS = 60


class Half(NullEngine):
    """An engine that holds half of one weight."""

    def __init__(self, rank: int, said: list[Any], meeting: Barrier) -> None:
        self.rank, self._said, self._meeting = rank, said, meeting
        self.elements = 2
        self.rounds = 0

    def gather(self, value: JSON) -> list[JSON]:
        self.rounds += 1
        self._said[self.rank] = value
        self._meeting.wait(PATIENCE_SECONDS)
        everyones = list(self._said)
        self._meeting.wait(PATIENCE_SECONDS)
        return everyones

    def state_layout(self) -> dict[StateKey, StateForm]:
        return {("w", "weight"): StateForm((4,))}

    def export_state(self, owner: Callable[[str], int]) -> Iterator[StatePiece]:
        yield StatePiece("w", "weight", torch.full((self.elements,), float(self.rank)), 2 * self.rank)


class Pair:
    """Two checkpointers of one run; the first commits when `gate` is open."""

    def __init__(self, folder: Path, **section: Any) -> None:
        self.folder, self.said, self.gate = folder, list[str](), Event()
        self.gate.set()
        meeting, shared = Barrier(2), [None, None]
        self.engines = [Half(rank, shared, meeting) for rank in (0, 1)]
        spec = Spec.model_validate({**MINIMAL, "checkpoint": {"background": True, **section}})
        self.checkpointers = [
            Checkpointer(
                spec.checkpoint,
                registry.load("null").resolve(spec, 2),
                "abc",
                None,
                folder if rank == 0 else None,
                self.said.append if rank == 0 else lambda text: None,
                self._commit,
                rank,
            )
            for rank in (0, 1)
        ]

    def _commit(self) -> None:
        assert self.gate.wait(PATIENCE_SECONDS)

    def save(self, step: int, last: bool = False) -> list[BaseException | None]:
        """Both; returns what each raised."""
        with ThreadPoolExecutor(2) as pool:
            pairs = zip(self.checkpointers, self.engines, strict=True)
            futures = [pool.submit(one.save, engine, step, last) for one, engine in pairs]
        return [future.exception() for future in futures]

    def wait(self) -> None:
        for one in self.checkpointers:
            assert one.writing is not None
            one.writing.join(PATIENCE_SECONDS)

    def stored(self, step: int) -> list[float]:
        (checkpoint,) = [one for one in complete_checkpoints(self.folder) if one.step == step]
        weight = checkpoint.reader().read("w", "weight")
        assert weight is not None
        return weight.tolist()


def test_after_a_save_that_has_ended_two_rounds_are_enough(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.save(1)
    pair.wait()
    before = [engine.rounds for engine in pair.engines]
    pair.save(2)
    assert [engine.rounds for engine in pair.engines] == [rounds + 2 for rounds in before]
    assert pair.save(3, last=True) == [None, None]
    assert found(tmp_path) == [1, 2, 3]
    assert pair.stored(3) == [0.0, 0.0, 1.0, 1.0]


def test_a_save_that_only_the_first_rank_has_not_ended_is_waited_for_by_both(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.gate.clear()
    pair.save(1)
    second = pair.checkpointers[1].writing
    assert second is not None
    second.join(PATIENCE_SECONDS)
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(pair.save, 2)
        while pair.engines[0].rounds < 3:  # both have told that one of them is not there yet
            assert not saving.done()
        pair.gate.set()
        assert saving.result(PATIENCE_SECONDS) == [None, None]
    pair.wait()
    assert found(tmp_path) == [1, 2]


@pytest.mark.parametrize("waits", [True, False], ids=["ended long ago", "just begun"])
def test_a_failure_on_one_rank_is_told_once_and_training_goes_on_everywhere(
    tmp_path: Path, waits: bool
) -> None:
    pair = Pair(tmp_path)
    pair.engines[1].elements = 3  # do not fit
    pair.save(1)
    if waits:
        pair.wait()
    pair.engines[1].elements = 2
    assert pair.save(2, last=True) == [None, None]
    assert found(tmp_path) == [2]
    assert len(pair.said) == 1
    assert "step-00000001 was not saved: rank 1: w: 12 bytes from byte 8 on do not fit" in pair.said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_a_failure_of_the_last_save_is_an_error_on_both(tmp_path: Path) -> None:
    pair = Pair(tmp_path)
    pair.engines[1].elements = 3
    raised = pair.save(1, last=True)
    for error in raised:
        assert isinstance(error, RunFailed)
        assert "was not saved: rank 1: w: 12 bytes from byte 8 on do not fit, and it was the last" in str(
            error
        )
    assert found(tmp_path) == []
