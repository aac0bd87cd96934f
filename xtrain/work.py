"""One process's part of a run, from its data to its record."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from xtrain.allocator import give_back_freed_memory
from xtrain.checkpoints.manager import restore
from xtrain.checkpoints.select import Selected, require_folder
from xtrain.choose import Choice
from xtrain.collection import begin_collecting
from xtrain.contract import DecidesLater, Engine, Job, OutOfMemory, Resolved
from xtrain.data import Dataset, open_data
from xtrain.errors import RunFailed
from xtrain.fitting import Fitted, TooMuch, fit
from xtrain.guards import Guards
from xtrain.host_random import seed_host
from xtrain.launching.preflight import everyones, known, preflight, told_to_others
from xtrain.measure.machine import resident_bytes
from xtrain.models.source import NotedSource, model_source
from xtrain.plan.layout import Planned
from xtrain.plan.predict import predict
from xtrain.prepare import (
    discarded_on_refusal,
    fill,
    go_on_from,
    going_on,
    has_launcher,
    is_new,
    open_directory,
    run_directory,
    run_of,
)
from xtrain.records.recorder import Facts
from xtrain.records.rundir import RunDirectory
from xtrain.relief import describe_out_of_memory
from xtrain.request import Request
from xtrain.resume import Start, agreed, find_start
from xtrain.signals import StopRequest
from xtrain.spec.tree import Spec
from xtrain.training import Run, about_saved, hang_seconds


def work(request: Request, spec: Spec, choice: Choice, job: Job, stop: StopRequest) -> int:
    """One process's part of a run, from its data to its record; returns the exit code.

    Under `memory: auto` it begins again, with less memory, when the device was full.
    """
    say(job.rank == 0, f"backend {choice.backend.name}: {choice.reason}")
    request = going_on(request)
    made = None
    while True:
        try:
            return _attempt(request, spec, choice, job, made).run(stop)
        except TooMuch as full:
            if job.world > 1:  # the others wait for this one: the launcher begins again
                raise
            say(True, f"note: {full}")
            made = RunDirectory(full.directory)
            if full.begun:  # else it has not yet what it goes on from
                request = replace(request, resume=full.directory, out=None)
        gc.collect()  # the engine, whose parts know each other
        give_back_freed_memory()


def _attempt(request: Request, spec: Spec, choice: Choice, job: Job, made: RunDirectory | None) -> Attempt:
    """The next one; `made` is the directory of the one before it."""
    with told_to_others(job):
        if request.resume:
            require_folder(request.resume)  # before anything that takes time
        directory = (made or open_directory(request)) if job.rank == 0 else None
        fitted = _fit(request, spec, choice, job, directory) if spec.memory == "auto" else None
    return Attempt(request, fitted.rung.spec if fitted else spec, choice, job, directory, fitted)


def _fit(request: Request, spec: Spec, choice: Choice, job: Job, directory: RunDirectory | None) -> Fitted:
    """The techniques of `memory: auto`, the same on every rank."""
    path = directory.path if directory else run_directory(request)
    own = choice.backend.room_bytes(job) if isinstance(choice.backend, Planned) else None
    rooms = [own] if job.world == 1 else everyones(job, "room", own, hang_seconds(spec))
    room = None if None in rooms else min(rooms)
    fitted = fit(spec, job.world, choice.backend, room, path)
    say(job.rank == 0, fitted.notes[-1])
    return fitted


@dataclass(frozen=True)
class Attempt:
    """One process's part of a run with one set of techniques."""

    request: Request
    spec: Spec
    choice: Choice
    job: Job
    directory: RunDirectory | None
    """Rank 0 has it."""
    fitted: Fitted | None
    """Under `memory: auto`."""

    def run(self, stop: StopRequest) -> int:
        """From the data to the record; returns the exit code. TooMuch where there is less to try."""
        with self.directory.lock() if self.directory else nullcontext():
            with discarded_on_refusal(self._own_directory()):
                run = self._begin(stop)
            stop.begin(self.job.rank == 0)
            try:
                return run.train()
            finally:
                run.facts.engine.close()

    def _own_directory(self) -> RunDirectory | None:
        """Where this process made it for this request: a launcher sees to one that it made."""
        new = self.directory and not has_launcher() and is_new(self.directory, self.request)
        return self.directory if new else None

    def _begin(self, stop: StopRequest) -> Run:
        """All that comes before the first step, on every rank. Collective."""
        job, spec, backend = self.job, self.spec, self.choice.backend
        with told_to_others(job):
            data, begin, model, resolved = self._prepare()
        begin_collecting()
        if job.world > 1:
            preflight(job, known(job, spec, data.content_hash), hang_seconds(spec), self._say)
        before = resident_bytes()
        guards = Guards(spec.stability) if spec.stability else None
        with self._watching_memory(resolved, begin):
            engine, begin = self._start(resolved, model, begin, guards)
        notes = (*model.notes, *engine.notes)
        resolved = self._as_started(resolved, engine, notes)
        predicted = predict(spec, job.world, backend, data.vocab_size, engine, model.outline)
        if self.directory:  # only now: a request that is refused has changed nothing
            fill(self.directory, self.request, resolved, begin, self._say)
        self._say(f"model {model.description}: {engine.parameter_count:,} parameters")
        for note in notes:
            self._say(f"note: {note}")
        facts = Facts(resolved, data, model, engine, predicted)
        return Run(
            self.request, facts, backend, self.directory, job, begin, guards, before, stop, self.fitted
        )

    def _prepare(self) -> tuple[Dataset, Start, NotedSource, Resolved]:
        """All that is known without the other processes."""
        spec, request = self.spec, self.request
        if self.fitted and self.directory:
            self.fitted.write_down()
        selected = self._select()
        data = open_data(spec, show_progress=self.job.rank == 0)
        self._say(f"data {data.description}")
        model = model_source(spec, data.vocab_size, resumed=selected.checkpoint is not None)
        begin = find_start(selected, spec, data.content_hash, model.content_hash, request.allow_changed)
        resolved = self.choice.backend.resolve(spec, self.job.world)
        for note in resolved.notes:
            self._say(f"note: {note}")
        return data, begin, model, resolved

    def _select(self) -> Selected:
        """The checkpoint that is asked for; damaged ones that were passed over are named."""
        resume = self.request.resume
        if resume is None:
            return Selected(None)
        selected = go_on_from(resume, hashes=self.job.rank == 0)
        for _, reason in selected.damaged:
            self._say(f"warning: {reason}")
        if selected.checkpoint is None:
            RunDirectory.open(run_of(resume))  # a run that was not saved yet, or nothing to go on from
        return selected

    def _start(
        self, resolved: Resolved, model: NotedSource, begin: Start, guards: Guards | None
    ) -> tuple[Engine, Start]:
        """The engine where rank 0's start leaves it. Collective."""
        engine = self.choice.backend.start(resolved, model, self.job)
        seed_host(self.spec.train.seed + self.job.rank)  # as the engine has just done with torch's
        begin = agreed(engine, begin)
        if begin.checkpoint:
            restore(engine, begin.checkpoint, guards, self.job.rank)
        return engine, begin

    @contextmanager
    def _watching_memory(self, resolved: Resolved, begin: Start) -> Iterator[None]:
        """A model that does not fit ends the run with a message, or begins again with less where it can."""
        try:
            yield
        except OutOfMemory as full:
            if self.fitted and self.fitted.lower and (self.job.world == 1 or has_launcher()):
                raise self.fitted.too_much(full, None, begun=False) from None
            saved = about_saved(begin, self.directory)
            message = describe_out_of_memory(full, None, resolved, self.choice.backend, saved)
            raise RunFailed(message) from full

    def _as_started(self, resolved: Resolved, engine: Engine, notes: Sequence[str]) -> Resolved:
        """With what was decided later than the spec was read."""
        resolved = engine.resolved if isinstance(engine, DecidesLater) else resolved
        resolved = replace(resolved, notes=(*resolved.notes, *notes))
        return self.fitted.noted(resolved) if self.fitted else resolved

    def _say(self, text: str) -> None:
        say(self.job.rank == 0, text)


def say(first: bool, text: str) -> None:
    """For people, from the first rank only."""
    if first:
        print(text, file=sys.stderr, flush=True)
