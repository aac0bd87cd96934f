"""When a run saves, what it keeps, and how it goes on from there."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from xtrain.checkpoints.format import (
    STATE,
    Checkpoint,
    CheckpointError,
    State,
    Tensors,
    complete_checkpoints,
    folder_name,
    write,
)
from xtrain.contract import Engine, Resolved
from xtrain.errors import RunFailed
from xtrain.guards import Guards
from xtrain.machine import RECORDED_PACKAGES, package_version
from xtrain.spec import dump_spec
from xtrain.spec.tree import Checkpoint as CheckpointSection


@dataclass
class Checkpointer:
    """Saves on all ranks together; only the one with `folder` (rank 0) touches the disk."""

    section: CheckpointSection
    resolved: Resolved
    data_hash: str
    guards: Guards | None
    folder: Path | None
    say: Callable[[str], None]
    before_commit: Callable[[], None]
    """Brings the metrics to the disk: a checkpoint never knows more steps than they do."""
    last_step: int | None = None
    last_seconds: float = 0.0
    best: tuple[int, float] | None = None
    """Step and eval_loss of the lowest so far; the same on every rank."""

    def __post_init__(self) -> None:
        self.last_seconds = monotonic()

    def due(self, done: int) -> bool:
        """Whether `done` updates call for a save; the same answer on every rank."""
        every = self.section.every_steps
        return every is not None and done % every == 0

    def evaluated(self, done: int, eval_loss: float | None) -> None:
        """Take note of an evaluation after `done` updates, where checkpoint.best asks for it."""
        if not self.section.best or eval_loss is None or not math.isfinite(eval_loss):
            return
        if self.best is None or eval_loss < self.best[1]:
            self.best = (done, eval_loss)

    def is_best(self, done: int) -> bool:
        return self.best is not None and self.best[0] == done

    def overdue(self, engine: Engine) -> bool:
        """Whether every_minutes have passed by rank 0's clock. Collective; asked once per logging window."""
        minutes = self.section.every_minutes
        if minutes is None:
            return False
        return bool(engine.gather(monotonic() - self.last_seconds >= 60 * minutes)[0])

    def save(self, engine: Engine, done: int, last: bool) -> None:
        """Write the state after `done` updates, unless it is there already. Collective.

        Raises RunFailed when it cannot be written and checkpoint.on_error is stop, or it is the `last`
        one: then there is no training left to go on with.
        """
        if done == self.last_step:
            return
        exported = engine.export_state(lambda name: 0)
        tensors = {(t.name, t.kind): t.value for t in exported if t.value is not None}
        extras = engine.gather(engine.extras())
        self.last_step, self.last_seconds = done, monotonic()
        if self.folder is None:
            return
        state = State(
            step=done,
            backend=self.resolved.backend,
            world=self.resolved.world,
            guards=self.guards.state() if self.guards else None,  # type: ignore[arg-type]
            extras=extras,  # type: ignore[arg-type]
            data_hash=self.data_hash,
            best=self.best,
            spec=dump_spec(self.resolved.spec),
            versions={name: package_version(name) for name in RECORDED_PACKAGES},
        )
        self._write(self.folder, state, tensors, last)

    def _write(self, folder: Path, state: State, tensors: Tensors, last: bool) -> None:
        self.before_commit()
        try:
            write(folder, state, tensors)
        except OSError as error:
            message = f"checkpoint {folder / folder_name(state.step)} was not saved: {error.strerror}"
            if last:
                raise RunFailed(f"{message}, and it was the last; earlier ones are intact") from error
            if self.section.on_error == "stop":
                raise RunFailed(
                    f"{message} (checkpoint.on_error is stop); earlier ones are intact"
                ) from error
            self.say(f"warning: {message}; earlier ones are intact, training goes on")
            return
        for old in complete_checkpoints(folder)[: -self.section.keep]:
            if not self.is_best(old.step):
                shutil.rmtree(old.path, ignore_errors=True)


def latest(path: Path) -> Checkpoint | None:
    """The checkpoint that `--resume PATH` means: the newest of a run directory, or the one that PATH is.

    None when the run directory has none yet. Raises CheckpointError when there is nothing at `path`.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"--resume {path}: {'a file' if path.exists() else 'not there'}; expected a run directory"
        )
    if path.name.startswith("step-"):
        found = [one for one in complete_checkpoints(path.parent) if one.path.name == path.name]
        if not found:
            raise CheckpointError(f"--resume {path} is not a checkpoint")
        return found[0]
    checkpoints = complete_checkpoints(path / "checkpoints")
    return checkpoints[-1] if checkpoints else None


def set_aside_after(folder: Path, step: int) -> Path | None:
    """Move the checkpoints after `step` out of the way of a run that goes on from there.

    They are of a course that is no longer this run's: left in place they would be resumed from, and be kept
    instead of newer ones. Returns the folder they are in now, where there were any.
    """
    later = [checkpoint for checkpoint in complete_checkpoints(folder) if checkpoint.step > step]
    if not later:
        return None
    number = 1
    while (aside := folder / f"superseded-{number}").exists():
        number += 1
    aside.mkdir()
    for checkpoint in later:
        checkpoint.path.rename(aside / checkpoint.path.name)
    return aside


def restore(engine: Engine, checkpoint: Checkpoint, guards: Guards | None, rank: int) -> int:
    """Bring the engine and the guards to where the checkpoint left them; returns the updates done."""
    state = checkpoint.state()
    try:
        engine.import_state(checkpoint.reader())
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this model: {error}") from error
    try:
        engine.restore_extras(state.extras[min(rank, len(state.extras) - 1)])
        if guards and state.guards:
            guards.restore(state.guards)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path / STATE} is damaged: extras or guards: {type(error).__name__}: {error}"
        ) from error
    return state.step
