"""`memory: auto` in a run: the rung it begins with, and the next one when the device is full.

What is tried lies in the run directory (memory.json) before it is tried, so that it outlives the process: a
kill by the system leaves no time to write. A rung that was too much is not tried again, also not when the run
is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xtrain.contract import JSON, Backend, OutOfMemory, Resolved
from xtrain.errors import EXIT_FAILED, RunFailed
from xtrain.launching.launch import Ended
from xtrain.plan.auto import Rung, predicted_bytes, rungs, sized
from xtrain.plan.ladder import USABLE
from xtrain.records.rundir import write_json
from xtrain.records.summary import format_bytes
from xtrain.spec.tree import Spec

HISTORY = "memory.json"


class TooMuch(RunFailed):
    """The device was full, and there is a rung below: the run in `directory` goes on there.

    Among several processes it ends this one: the launcher begins again.
    """

    def __init__(self, message: str, directory: Path, begun: bool) -> None:
        super().__init__(message)
        self.directory = directory
        self.begun = begun
        """Whether the run directory was filled: else the same request is made again, in there."""


@dataclass(frozen=True)
class Failure:
    """A rung that was too much."""

    rung: str
    why: str
    saved_step: int | None
    """The update after which the run could be saved then; None where an earlier checkpoint has to do."""


@dataclass(frozen=True)
class Fitted:
    """The rung that a run is on."""

    rung: Rung
    lower: Sequence[Rung]
    failures: Sequence[Failure]
    reason: str
    directory: Path
    """Of the run."""

    @property
    def notes(self) -> list[str]:
        told = [f"memory: auto: {one.rung} was too much: {one.why}" for one in self.failures]
        return [*told, f"memory: auto: trains with {self.rung.name}: {self.reason}"]

    def too_much(self, full: OutOfMemory, saved_step: int | None, *, begun: bool) -> TooMuch:
        """Word of it is left in the run directory, for whoever goes on there."""
        add_failure(self.directory, Failure(self.rung.name, str(full), saved_step))
        where = "step 0 or the last checkpoint" if saved_step is None else f"step {saved_step}"
        return TooMuch(
            f"{full}, with {self.rung.name}; it goes on from {where} with less", self.directory, begun
        )

    def noted(self, resolved: Resolved) -> Resolved:
        """With what was chosen, and why, in its notes and settings."""
        settings = {**resolved.settings, "memory_auto": self.settings()}
        return replace(resolved, notes=(*resolved.notes, *self.notes), settings=settings)

    def write_down(self) -> None:
        """For whoever begins again when this process is killed. Raises RunFailed."""
        _write(self.directory, self.settings())

    def settings(self) -> dict[str, JSON]:
        return {
            "rung": self.rung.name,
            "reason": self.reason,
            "failures": [vars(one) for one in self.failures],
            "lower": [one.name for one in self.lower],
        }


def fit(spec: Spec, world: int, backend: Backend, room_bytes: int | None, directory: Path) -> Fitted:
    """The rung that a run in `directory` is on. `room_bytes` is what a device has, the same on every rank."""
    ladder = rungs(spec, world, backend)
    failures = read_history(directory)
    failed = {one.rung for one in failures}
    left = [rung for place, rung in enumerate(ladder) if not any(r.name in failed for r in ladder[place:])]
    if not left:
        return Fitted(ladder[-1], (), failures, "the last there is", directory)
    if failures:  # the prediction was wrong, or somebody else needs memory too
        return Fitted(left[0], left[1:], failures, "the next one below", directory)
    place, reason = _first_that_fits(left, world, backend, room_bytes)
    return Fitted(left[place], left[place + 1 :], failures, reason, directory)


def _first_that_fits(
    left: Sequence[Rung], world: int, backend: Backend, room_bytes: int | None
) -> tuple[int, str]:
    if room_bytes is None:
        return 0, "how much memory there is, is not known"
    model = sized(left[0].spec, backend)
    if isinstance(model, str):
        return 0, f"what it needs is known only once it runs: {model}"
    for place, rung in enumerate(left):
        needed = predicted_bytes(rung.spec, world, backend, model)
        if needed is None:
            return place, "what it needs is known only once it runs"
        if needed <= USABLE * room_bytes:
            return place, f"{format_bytes(needed)} predicted, {format_bytes(room_bytes)} there"
    return len(left) - 1, f"the last there is; {format_bytes(room_bytes)} are there"


def read_history(directory: Path) -> list[Failure]:
    """Of the run in `directory`; nothing where it has none."""
    found = _read(directory).get("failures")
    try:
        return [Failure(str(one["rung"]), str(one["why"]), one["saved_step"]) for one in found or ()]
    except (KeyError, TypeError):
        return []


def add_failure(directory: Path, failure: Failure) -> None:
    """From now on the run in `directory` does without that rung and those above it. RunFailed: it cannot."""
    before = read_history(directory)
    if failure.rung in [one.rung for one in before]:  # several processes were full at once
        return
    try:
        _write(directory, {**_read(directory), "failures": [vars(one) for one in (*before, failure)]})
    except RunFailed as error:
        raise RunFailed(f"{failure.why}; {error}") from error


def lower_after(ended: Ended, directory: Path, failures_before: int) -> bool:
    """For the launcher: whether the run in `directory` is to begin again, one rung down.

    A killed process could leave no word: it was on the first rung that has not failed yet. A kill that the
    system did not count among those for memory is somebody's wish that it ends.
    """
    was = _read(directory)
    ladder: list[str | None] = [was.get("rung"), *was.get("lower", ())]
    failed = [one.rung for one in read_history(directory)]
    if ended.code != EXIT_FAILED:
        return False
    if len(failed) > failures_before:
        return failed[-1] in ladder[:-1]
    on = next((name for name in ladder if name not in failed), None)
    if ended.killed_for_memory in (None, "no") or on is None:
        return False
    add_failure(directory, Failure(on, ended.message.splitlines()[0], None))
    return on != ladder[-1]


def _read(directory: Path) -> dict[str, Any]:
    """What the last attempt in `directory` wrote down; empty where there was none."""
    try:
        found = json.loads((directory / HISTORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(directory: Path, said: dict[str, Any]) -> None:
    try:
        write_json(directory / HISTORY, said)
    except OSError as error:
        raise RunFailed(f"cannot write {directory / HISTORY}: {error.strerror}") from error
