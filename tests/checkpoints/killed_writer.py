"""Two ranks that save checkpoint after checkpoint and are killed (SIGKILL) at a planned moment of one.

Every call into the operating system that a save makes is an event, and so is the middle of every tensor and
document, with half of it written.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.test_format import state
from xtrain.checkpoints import tensorfile, writer
from xtrain.checkpoints.saving import Save
from xtrain.checkpoints.shares import plan_files
from xtrain.checkpoints.writer import Tensors, begin, form_of
from xtrain.contract import StateKind, StatePiece

ELEMENTS = 5_000


class Events:
    """Counts what a save does, once it is armed."""

    def __init__(self, kill_event: int) -> None:
        self.kill_event = kill_event
        self.count = 0
        self.armed = False

    def happen(self) -> None:
        if not self.armed:
            return
        if self.count == self.kill_event:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def before(self, owner: Any, name: str) -> None:
        """Make every call of `owner.name` an event, and go on with it."""
        plain: Callable[..., Any] = getattr(owner, name)

        def counted(*words: Any, **options: Any) -> Any:
            self.happen()
            return plain(*words, **options)

        setattr(owner, name, counted)

    def inside_of_writes(self) -> None:
        """A piece of a tensor comes to the disk in two halves, and a document too."""
        write_piece = tensorfile.TensorFile.write
        events = self

        def in_halves(file: tensorfile.TensorFile, key: str, value: torch.Tensor, begin: int = 0) -> int:
            events.happen()
            half = value.numel() // 2
            written = write_piece(file, key, value[:half], begin)
            file._file.flush()
            events.happen()
            return written + write_piece(file, key, value[half:], begin + half)

        setattr(tensorfile.TensorFile, "write", in_halves)  # noqa: B010
        plain = Path.write_bytes

        def twice(path: Path, data: bytes) -> int:
            events.happen()
            plain(path, data[: len(data) // 2])
            events.happen()
            return plain(path, data)

        setattr(Path, "write_bytes", twice)  # noqa: B010


def tensors(filled: int) -> Tensors:
    """All of them filled with one number, so that a torn mixture would be seen."""
    value = torch.full((ELEMENTS,), float(filled))
    kinds: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")
    return {(name, kind): value for name in "abc" for kind in kinds} | {("n", "buffer"): value.int()}


def pieces(rank: int, filled: int) -> Iterator[StatePiece]:
    """Half of each tensor on each of two ranks."""
    half = ELEMENTS // 2
    for (name, kind), whole in tensors(filled).items():
        yield StatePiece(name, kind, whole[rank * half :][:half], rank * half)


def save_of_two_ranks(folder: Path, step: int, filled: int) -> None:
    """What two processes do, one after the other, so that a kill hits both at a known moment."""
    plan = plan_files({key: form_of(tensor) for key, tensor in tensors(filled).items()}, 2)
    partial = begin(folder, step)
    facts = state(step, world=2, extras=[{}, {}])
    first, second = (
        Save(partial, plan, rank, 2, facts if rank == 0 else None, lambda: None, lambda: None)
        for rank in (0, 1)
    )
    assert first.write(pieces(0, filled)) is None
    assert second.write(pieces(1, filled)) is None
    assert first.finish() is None
    assert second.finish() is None
    assert first.commit() is None


def save_and_die(folder: Path, steps: int, kill_event: int) -> int:
    """Save `steps` times and die before that event of the last one; returns how many it has, if fewer."""
    events = Events(kill_event)
    events.before(os, "fsync")
    events.before(Path, "mkdir")
    events.before(Path, "rename")
    events.before(tensorfile.TensorFile, "write_header")
    events.before(writer, "sha256")
    events.before(shutil, "rmtree")
    events.inside_of_writes()
    for step in range(1, steps + 1):
        events.armed = step == steps
        save_of_two_ranks(folder, step, filled=step)
    return events.count


def replace_and_die(folder: Path, step: int, kill_event: int) -> int:
    """Save a step twice, filled with 1 and then 2, and die before that event of the change; the same."""
    events = Events(kill_event)
    save_of_two_ranks(folder, step, filled=1)
    events.before(Path, "rename")
    events.before(shutil, "rmtree")
    events.armed = True
    save_of_two_ranks(folder, step, filled=2)
    return events.count
