"""When a run saves, what it keeps, and how it goes on from there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from xtrain.checkpoints.format import (
    Checkpoint,
    CheckpointError,
    State,
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

    def __post_init__(self) -> None:
        self.last_seconds = monotonic()

    def due(self, done: int) -> bool:
        """Whether `done` updates call for a save; the same answer on every rank."""
        every = self.section.every_steps
        return every is not None and done % every == 0

    def save(self, engine: Engine, done: int) -> None:
        """Write the state after `done` updates, unless it is there already. Collective."""
        if done == self.last_step:
            return
        exported = engine.export_state(lambda name: 0)
        tensors = {(t.name, t.kind): t.value for t in exported if t.value is not None}
        extras = engine.gather(engine.extras())
        self.last_step = done
        if self.folder is None:
            return
        state = State(
            step=done,
            backend=self.resolved.backend,
            world=self.resolved.world,
            guards=self.guards.state() if self.guards else None,  # type: ignore[arg-type]
            extras=extras,  # type: ignore[arg-type]
            data_hash=self.data_hash,
            spec=dump_spec(self.resolved.spec),
            versions={name: package_version(name) for name in RECORDED_PACKAGES},
        )
        self._write(self.folder, state, tensors)

    def _write(self, folder: Path, state: State, tensors: dict) -> None:  # type: ignore[type-arg]
        self.before_commit()
        try:
            write(folder, state, tensors)
        except OSError as error:
            message = f"checkpoint {folder / folder_name(state.step)} was not saved: {error.strerror}"
            if self.section.on_error == "stop":
                raise RunFailed(
                    f"{message} (checkpoint.on_error is stop); earlier ones are intact"
                ) from error
            self.say(f"warning: {message}; earlier ones are intact, training goes on")
            return
        for old in complete_checkpoints(folder)[: -self.section.keep]:
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


def restore(engine: Engine, checkpoint: Checkpoint, guards: Guards | None, rank: int) -> int:
    """Bring the engine and the guards to where the checkpoint left them; returns the updates done."""
    state = checkpoint.state()
    try:
        engine.import_state(checkpoint.reader())
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this model: {error}") from error
    engine.restore_extras(state.extras[min(rank, len(state.extras) - 1)])
    if guards and state.guards:
        guards.restore(state.guards)
    return state.step
