"""When a run saves, what it keeps, and how it goes on from there."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

from pydantic import JsonValue

from xtrain.checkpoints.format import (
    STATE,
    Checkpoint,
    CheckpointError,
    State,
    complete_checkpoints,
    folder_name,
    wrapper_of,
)
from xtrain.checkpoints.saving import HostBuffers, Save, Writing
from xtrain.checkpoints.select import prune
from xtrain.checkpoints.shares import MOMENTS, Plan, plan_files
from xtrain.checkpoints.writer import begin
from xtrain.contract import Engine, Resolved, StateForm, StateKey, StateKind, StatePiece
from xtrain.errors import RunFailed
from xtrain.guards import Guards
from xtrain.host_random import host_random_state, restore_host_random
from xtrain.measure.machine import RECORDED_PACKAGES, package_version
from xtrain.spec import dump_spec
from xtrain.spec.tree import Checkpoint as CheckpointSection

PATIENCE_SECONDS = 10.0
"""For the shares of other ranks when this one leaves after an error: they may be gone."""
Words: TypeAlias = tuple[str, str]
"""What was not saved and why; what is left to go on from."""


class _NotSaved(Exception):
    """One save failed; the same words on every rank."""

    def __init__(self, message: str, earlier: str) -> None:
        super().__init__(message)
        self.earlier = earlier
        """What is left to go on from."""


@dataclass
class Checkpointer:
    """Saves on all ranks together; all write, the one with `folder` (rank 0) decides where and commits."""

    section: CheckpointSection
    resolved: Resolved
    data_hash: str
    guards: Guards | None
    folder: Path | None
    say: Callable[[str], None]
    before_commit: Callable[[], None]
    """Brings the metrics to the disk: a checkpoint never knows more steps than they do."""
    rank: int = 0
    last_step: int | None = None
    last_seconds: float = 0.0
    best: tuple[int, float] | None = None
    """Step and eval_loss of the lowest so far; the same on every rank."""
    model_hash: str | None = None
    has_saved: bool = False
    """Whether there is a checkpoint to go on from, as far as the ranks know together."""
    buffers: HostBuffers = field(default_factory=HostBuffers)
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What the model's library wants beside the weights; the same on every rank."""
    writing: Writing | None = None
    """The save that is under way in the background."""
    _planned: tuple[Mapping[StateKey, StateForm], Plan] | None = None

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

    def failed_since(self) -> bool:
        """Whether the save under way has failed and the run is to stop for it; where it is to go on, says so.

        Local, and asked after every step.
        """
        if self.writing is None or self.writing.problem is None or self.writing.told:
            return False
        if self.section.on_error == "stop":
            return True
        self._warn(self.writing)
        return False

    def save(self, engine: Engine, done: int, last: bool) -> None:
        """Save the state after `done` updates, unless it was saved already. Collective.

        Waits for the save before it; for this one only when it is not in the background, or is the `last`.
        Raises RunFailed when a save failed and checkpoint.on_error is stop, or it is the last one: then there
        is no training left to go on with.
        """
        if done != self.last_step:
            self._settle(engine, last=False)
            self.last_step, self.last_seconds = done, monotonic()
            try:
                self._save(engine, done)
            except _NotSaved as failure:
                self._failed(failure, last)
        if last:
            self._settle(engine, last)

    def close(self) -> None:
        """Local, after an error too: let a save that is under way end, if this rank can see to it."""
        if self.writing is None:
            return
        self.writing.end(PATIENCE_SECONDS if self.resolved.world > 1 else math.inf)
        if self.writing.problem is not None and not self.writing.told:
            self._warn(self.writing)

    def _save(self, engine: Engine, done: int) -> None:
        plan = self._plan(engine)
        pieces = engine.export_state(plan.owners.__getitem__)
        extras = {**engine.extras(), "host_random": host_random_state()}
        answers: list[Any] = engine.gather([*self._open(done), extras])
        partial, problem, _ = answers[0]
        if problem is not None:
            raise _NotSaved(*problem)
        state = self._state(done, [extras for *_, extras in answers]) if self.rank == 0 else None
        best_step = self.best[0] if self.best else None
        prune_after = functools.partial(self._prune, best_step)
        save = Save(
            Path(partial),
            plan,
            self.rank,
            self.resolved.world,
            state,
            self.before_commit,
            prune_after,
            self.files,
        )
        if self.section.background:
            self.writing = Writing(save, self.buffers.copy(pieces))
            self.writing.start()
        else:
            self._write(engine, save, pieces)

    def _plan(self, engine: Engine) -> Plan:
        """That of the save before, where the state has the same form."""
        layout = engine.state_layout()
        if self._planned is not None and self._planned[0] == layout:
            return self._planned[1]
        try:
            plan = plan_files(layout, self.resolved.world, wrapper=wrapper_of(self.files))
        except ValueError as error:  # the same on every rank, as the layout is
            self._agree(engine, str(error))
            raise
        self._planned = layout, plan
        return plan

    def _open(self, done: int) -> tuple[str | None, Words | None]:
        """On rank 0: the folder to write into, or what went wrong."""
        if self.folder is None:
            return None, None
        try:
            return str(begin(self.folder, done)), None
        except OSError as error:
            return None, self._words(done, error.strerror or str(error))

    def _state(self, done: int, extras: list[Any]) -> State:
        return State(
            step=done,
            backend=self.resolved.backend,
            world=self.resolved.world,
            guards=self.guards.state() if self.guards else None,  # type: ignore[arg-type]
            extras=extras,
            data_hash=self.data_hash,
            model_hash=self.model_hash,
            best=self.best,
            spec=dump_spec(self.resolved.spec),
            versions=self._versions,
        )

    @cached_property
    def _versions(self) -> dict[str, JsonValue]:
        """Asked for once: it is read from files, while training waits."""
        return {name: package_version(name) for name in RECORDED_PACKAGES}

    def _write(self, engine: Engine, save: Save, pieces: Iterator[StatePiece]) -> None:
        """While training waits."""
        problem = _first(engine.gather(save.write(pieces)))
        if problem is None:
            problem = _first(engine.gather(save.finish()))
        if self.rank == 0:
            problem = save.abandon(problem) if problem is not None else save.commit()
        self._agree(engine, problem)

    def _settle(self, engine: Engine, last: bool) -> None:
        """Wait for the save in the background, if there is one. Collective."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        problem, ended = None, False
        for stage in (writing.written, writing.finished):  # every rank gets through one before the next
            if problem is None and not ended:
                stage.wait()
                found: list[Any] = engine.gather([not writing.is_alive(), writing.problem])
                ended = all(alone for alone, _ in found)  # long ago, most likely: then all is said
                problem = _first(problem for _, problem in found)
        if ended and problem is None:
            self.has_saved = True
            return
        writing.end(math.inf if problem is None else 0.0)
        try:
            self._agree(engine, problem or writing.problem)
        except _NotSaved as failure:
            if last or not writing.told:
                self._failed(failure, last)

    def _agree(self, engine: Engine, problem: str | None) -> None:
        """Raise _NotSaved on every rank where rank 0 has a problem."""
        words = self._words(self.last_step or 0, problem) if problem is not None and self.folder else None
        said: Any = engine.gather(words)[0]
        if said is not None:
            raise _NotSaved(*said)
        self.has_saved = True

    def _words(self, step: int, reason: str) -> Words:
        assert self.folder is not None
        others = bool(complete_checkpoints(self.folder))
        message = f"checkpoint {self.folder / folder_name(step)} was not saved: {reason}"
        return message, "earlier ones are intact" if others else "there is no earlier one"

    def _warn(self, writing: Writing) -> None:
        writing.told = True
        if self.rank == 0:
            message, earlier = self._words(self.last_step or 0, writing.problem or "")
            self.say(f"warning: {message}; {earlier}")

    def _failed(self, failure: _NotSaved, last: bool) -> None:
        if last:
            raise RunFailed(f"{failure}, and it was the last; {failure.earlier}") from failure
        if self.section.on_error == "stop":
            raise RunFailed(f"{failure} (checkpoint.on_error is stop); {failure.earlier}") from failure
        self.say(f"warning: {failure}; {failure.earlier}, training goes on")

    def _prune(self, best_step: int | None) -> None:
        """What cannot be deleted is told, and no reason to call the new one unsaved."""
        assert self.folder is not None
        try:
            prune(self.folder, self.section.keep, best_step)
        except OSError as error:
            reason = f"{error.filename or self.folder}: {error.strerror or error}"
            self.say(f"warning: an older checkpoint could not be deleted: {reason}")


def own_best(engine: Engine, state: State | None, folder: Path | None) -> tuple[int, float] | None:
    """The best so far of a run that goes on from `state`, where it is among the checkpoints in `folder`.

    It need not be: the run may be another one's, and checkpoints may be set aside or removed. Then the next
    evaluation is the best that is kept. Rank 0, which has the folder, decides. Collective.
    """
    best = state.best if state else None
    kept = [one.step for one in complete_checkpoints(folder)] if folder else []
    return best if engine.gather(best is not None and best[0] in kept)[0] else None


def restore(engine: Engine, checkpoint: Checkpoint, guards: Guards | None, rank: int) -> int:
    """Bring the engine and the guards to where the checkpoint left them; returns the updates done."""
    state = checkpoint.state()
    try:
        _check_shapes(engine, checkpoint)
        engine.import_state(checkpoint.reader())
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.path} does not fit this model: {error}") from error
    try:
        extras = state.extras[min(rank, len(state.extras) - 1)]
        engine.restore_extras(extras)
        own_random: Any = extras.get("host_random") or {}  # checkpoints before it have none
        restore_host_random(own_random)
        if guards and state.guards:
            guards.restore(state.guards)
    except (AttributeError, ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path / STATE} is damaged: extras or guards: {type(error).__name__}: {error}"
        ) from error
    return state.step


def _check_shapes(engine: Engine, checkpoint: Checkpoint) -> None:
    """Raise ValueError before a tensor of another model is read: it may be of any size."""
    reader = checkpoint.reader("np")
    kinds: tuple[StateKind, ...] = ("weight", *MOMENTS)
    for (name, own), form in engine.state_layout().items():
        for kind in kinds if own == "weight" else (own,):
            found = reader.shape(name, kind)
            if found not in (None, form.shape):
                raise ValueError(f"{kind} of {name}: found {found}, expected {form.shape}")


def _first(problems: Iterable[Any]) -> str | None:
    return next((problem for problem in problems if problem is not None), None)
