"""A writer that saves checkpoint after checkpoint and kills itself (SIGKILL) at a planned moment of one.

Every call into the operating system that a save makes is an event, and so is the middle of every tensor and
document, with half of it written.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.test_format import state
from xtrain.checkpoints import tensorfile, writer
from xtrain.checkpoints.writer import Tensors, write
from xtrain.contract import StateKind

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
        """A tensor comes to the disk in two halves, and a document too."""
        add = tensorfile.TensorFile.add
        events = self

        def in_halves(file: tensorfile.TensorFile, key: str, tensor: torch.Tensor) -> None:
            events.happen()
            add(file, key, tensor)
            file._file.flush()
            whole = file._file.tell()
            os.truncate(file.path, whole - tensor.numel() * 2)
            events.happen()
            file._file.seek(whole - tensor.numel() * 2)
            file._file.write(tensor.numpy().tobytes()[tensor.numel() * 2 :])

        setattr(tensorfile.TensorFile, "add", in_halves)  # noqa: B010
        plain = Path.write_bytes

        def twice(path: Path, data: bytes) -> int:
            events.happen()
            plain(path, data[: len(data) // 2])
            events.happen()
            return plain(path, data)

        setattr(Path, "write_bytes", twice)  # noqa: B010


def tensors(step: int) -> Tensors:
    """All of them filled with the step, so that a torn mixture would be seen."""
    value = torch.full((ELEMENTS,), float(step))
    kinds: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")
    return {(name, kind): value for name in "abc" for kind in kinds} | {("n", "buffer"): value.int()}


def save_and_die(folder: Path, steps: int, kill_event: int) -> int:
    """Save `steps` times and die before that event of the last one; returns how many it has, if fewer."""
    events = Events(kill_event)
    events.before(os, "fsync")
    events.before(Path, "mkdir")
    events.before(Path, "rename")
    events.before(tensorfile.TensorFile, "finish")
    events.before(writer, "sha256")
    events.before(shutil, "rmtree")
    events.inside_of_writes()
    for step in range(1, steps + 1):
        events.armed = step == steps
        write(folder, state(step), tensors(step))
    return events.count
