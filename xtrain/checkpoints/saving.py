"""One save by all ranks: each writes its share, and when all have, rank 0 makes a checkpoint of them.

At once, while training waits, or in the background from a copy of the state in host memory. The ranks leave
word for rank 0 in the folder itself: a thread may not use the collectives that training is using.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from time import monotonic, sleep
from typing import TYPE_CHECKING

from xtrain.checkpoints.format import State
from xtrain.checkpoints.shares import Shard
from xtrain.checkpoints.writer import Share, commit, discard, write_share
from xtrain.contract import StateKind, StateTensor
from xtrain.errors import described
from xtrain.rundir import write_text

if TYPE_CHECKING:
    import torch

LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Save:
    """One rank's part in a save."""

    partial: Path
    """The folder that rank 0 made for it."""
    shards: Sequence[Shard]
    """Of this rank."""
    rank: int
    world: int
    state: State | None
    """Rank 0 has it."""
    before_commit: Callable[[], None]
    after_commit: Callable[[], None]

    def write(self, tensors: Iterator[StateTensor]) -> str | None:
        """Write this rank's share; returns what went wrong. Draws all of `tensors`: others wait for it."""
        try:
            share = write_share(self.partial, self.shards, tensors)
            self._leave_word({"share": asdict(share)})
            return None
        except (OSError, ValueError) as error:
            problem = self._described(error)
            with suppress(OSError):
                self._leave_word({"problem": problem})
            for _ in tensors:
                pass
            return problem

    def commit(self, called_off: Callable[[], bool] = lambda: False) -> str | None:
        """Rank 0: wait for every share, then make the checkpoint; returns what went wrong."""
        assert self.state is not None
        try:
            shares = [self._await_share(rank, called_off) for rank in range(self.world)]
            for rank in range(self.world):
                self._word_of(rank).unlink()
            self.before_commit()
            commit(self.partial, self.state, shares)
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

    def _await_share(self, rank: int, called_off: Callable[[], bool]) -> Share:
        file = self._word_of(rank)
        while not file.exists():
            if called_off() or not self.partial.exists():
                raise ValueError("not every process wrote its share")
            sleep(LOOK_SECONDS)
        word = json.loads(file.read_text(encoding="utf-8"))
        if "problem" in word:
            raise ValueError(word["problem"])
        return Share(**word["share"])

    def _leave_word(self, word: dict[str, object]) -> None:
        write_text(self._word_of(self.rank), json.dumps(word))

    def _word_of(self, rank: int) -> Path:
        return self.partial / f".share-{rank:05d}.json"

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

    def __init__(self, save: Save, tensors: Sequence[StateTensor]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.save = save
        self.problem: str | None = None
        self.told = False
        """Whether people were told of the problem."""
        self.share_ended = Event()
        """This rank's share is written, or has failed."""
        self._tensors = tensors
        self._deadline = math.inf

    def run(self) -> None:
        try:
            self.problem = self.save.write(iter(self._tensors))
            self.share_ended.set()
            if self.save.rank == 0 and self.problem is not None:
                self.save.abandon(self.problem)
            elif self.save.rank == 0:
                self.problem = self.save.commit(lambda: monotonic() > self._deadline)
        except Exception as error:  # a thread's own traceback would be all that is ever seen of it
            self.problem = described(error)
        finally:
            self.share_ended.set()

    def end(self, patience_seconds: float) -> None:
        """Wait until it has ended; for the shares of other ranks, which may not come, no longer than that."""
        self.share_ended.wait()
        self._deadline = monotonic() + patience_seconds
        self.join()


class HostBuffers:
    """A copy of this rank's share of the state, in memory that is kept from save to save.

    Fresh memory would cost nearly as much time as writing the files.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, StateKind], torch.Tensor] = {}

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._kept.values())

    def copy(self, tensors: Iterable[StateTensor]) -> list[StateTensor]:
        """The tensors that are this rank's, as they are now."""
        copied = []
        for tensor in tensors:
            if (value := tensor.value) is None:
                continue
            kept = self._kept.get((tensor.name, tensor.kind))
            if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
                kept = value.new_empty(value.shape, device="cpu")
                self._kept[tensor.name, tensor.kind] = kept
            copied.append(StateTensor(tensor.name, tensor.kind, kept.copy_(value)))
        return copied
