"""One save by all ranks: each writes its pieces and finishes its files, then rank 0 makes a checkpoint of it.

At once, while training waits, or in the background from a copy of the state in host memory. The ranks leave
word for each other in the folder itself: a thread may not use the collectives that training is using.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from xtrain.checkpoints.format import State
from xtrain.checkpoints.shares import Plan
from xtrain.checkpoints.writer import commit, discard, finish_files, write_pieces
from xtrain.contract import StateKind, StatePiece
from xtrain.errors import described
from xtrain.records.rundir import write_text

if TYPE_CHECKING:
    import torch

Stage: TypeAlias = Literal["written", "finished"]
LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Save:
    """One rank's part in a save: `write`, `finish`, and on rank 0 `commit`. Each returns what went wrong."""

    partial: Path
    """The folder that rank 0 made for it."""
    plan: Plan
    rank: int
    world: int
    state: State | None
    """Rank 0 has it."""
    before_commit: Callable[[], None]
    after_commit: Callable[[], None]
    others: Mapping[str, bytes] = field(default_factory=dict)
    """What else is to be in the folder, by file name."""

    def write(self, pieces: Iterator[StatePiece]) -> str | None:
        """Write this rank's pieces, and draw all of them whatever happens: others wait for it."""
        problem = self._told("written", lambda: dict(write_pieces(self.partial, self.plan, pieces)))
        for _ in pieces:
            pass
        return problem

    def finish(self, called_off: Callable[[], bool] = lambda: False) -> str | None:
        """When all have written: finish the files that are this rank's."""

        def facts() -> Any:
            written = self._words("written", called_off)
            return finish_files(self.partial, self.plan, self.rank, written)

        return self._told("finished", facts)

    def commit(self, called_off: Callable[[], bool] = lambda: False) -> str | None:
        """When all have finished: make the checkpoint."""
        assert self.state is not None
        try:
            finished = self._words("finished", called_off)
            for file in self.partial.glob(".*.json"):
                file.unlink()
            self.before_commit()
            commit(self.partial, self.state, self.plan, finished, self.others)
            self.after_commit()
            return None
        except (OSError, ValueError) as error:
            return self._described(error)
        finally:
            discard(self.partial)

    def abandon(self, problem: str) -> str:
        """Rank 0: remove what was written; returns the problem."""
        discard(self.partial)
        return problem

    def _told(self, stage: Stage, work: Callable[[], Any]) -> str | None:
        """Do this rank's work of a stage, and leave word of it."""
        try:
            self._leave_word(stage, {"plan": self.plan.fingerprint, "done": work()})
            return None
        except (OSError, ValueError) as error:
            problem = self._described(error)
            with suppress(OSError):
                self._leave_word(stage, {"problem": problem})
            return problem

    def _words(self, stage: Stage, called_off: Callable[[], bool]) -> list[Any]:
        """What each rank has done; waits for it."""
        return [self._await_word(stage, rank, called_off) for rank in range(self.world)]

    def _await_word(self, stage: Stage, rank: int, called_off: Callable[[], bool]) -> Any:
        file = self._word_of(stage, rank)
        while not file.exists():
            if called_off() or not self.partial.exists():
                raise ValueError("not every process wrote its share")
            sleep(LOOK_SECONDS)
        word = json.loads(file.read_text(encoding="utf-8"))
        if "problem" in word:
            raise ValueError(word["problem"])
        if word["plan"] != self.plan.fingerprint:
            raise ValueError(f"rank {rank} has other tensors than rank {self.rank}")
        return word["done"]

    def _leave_word(self, stage: Stage, word: dict[str, Any]) -> None:
        write_text(self._word_of(stage, self.rank), json.dumps(word))

    def _word_of(self, stage: Stage, rank: int) -> Path:
        return self.partial / f".{stage}-{rank:05d}.json"

    def _described(self, error: Exception) -> str:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        if isinstance(error, FileNotFoundError) and not self.partial.exists():
            reason = (
                f"{platform.node()} does not see {self.partial.parent}; "
                "the run directory must be on a file system that all hosts share"
            )
        return f"rank {self.rank}: {reason}" if self.rank else reason


class Writing(Thread):
    """A save that goes on while training does."""

    def __init__(self, save: Save, pieces: Sequence[StatePiece]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.save = save
        self.problem: str | None = None
        self.told = False
        """Whether people were told of the problem."""
        self.written = Event()
        """This rank has written its pieces, or failed to; nobody else is waited for until then."""
        self.finished = Event()
        """And it has finished its files; the other ranks' pieces are waited for until then."""
        self._pieces = pieces
        self._deadline = math.inf

    def run(self) -> None:
        try:
            self.problem = self.save.write(iter(self._pieces))
            self.written.set()
            if self.problem is None:
                self.problem = self.save.finish(self._called_off)
            self.finished.set()
            if self.save.rank == 0 and self.problem is not None:
                self.save.abandon(self.problem)
            elif self.save.rank == 0:
                self.problem = self.save.commit(self._called_off)
        except Exception as error:  # a thread's own traceback would be all that is ever seen of it
            self.problem = described(error)
        finally:
            self.written.set()
            self.finished.set()

    def end(self, patience_seconds: float) -> None:
        """Wait until it has ended; for other ranks' parts, which may not come, no longer than that."""
        self.written.wait()
        self._deadline = monotonic() + patience_seconds
        self.join()

    def _called_off(self) -> bool:
        return monotonic() > self._deadline


class HostBuffers:
    """A copy of this rank's pieces of the state, in memory that is kept from save to save.

    Fresh memory would cost nearly as much time as writing the files.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, StateKind], torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())

    def copy(self, pieces: Iterable[StatePiece]) -> list[StatePiece]:
        """The pieces as they are now. A tensor has one piece on a rank."""
        return [replace(piece, value=self._copied(piece)) for piece in pieces]

    def _copied(self, piece: StatePiece) -> torch.Tensor:
        value, key = piece.value, (piece.name, piece.kind)
        kept = self._kept.get(key)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = self._kept[key] = value.new_empty(value.shape, device="cpu")
        return kept.copy_(value)
