"""One process's part of a run, from its data to its record."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from time import perf_counter

from xtrain.allocator import give_back_freed_memory
from xtrain.checkpoints.format import complete_checkpoints
from xtrain.checkpoints.manager import Checkpointer, own_best, restore
from xtrain.checkpoints.select import Selected, require_folder
from xtrain.choose import Choice
from xtrain.contract import Backend, Counter, DecidesLater, Job, OutOfMemory, Resolved
from xtrain.data import Dataset, open_data
from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, RunFailed
from xtrain.fitting import Fitted, TooMuch, fit
from xtrain.guards import Guards, watches
from xtrain.host_random import seed_host
from xtrain.launching.preflight import everyones, host_name, known, preflight, told_to_others
from xtrain.launching.watchdog import Patience, Watchdog
from xtrain.launching.worker import launched, leave_word
from xtrain.loop import Loop
from xtrain.measure.busy import BusyMeter
from xtrain.measure.machine import resident_bytes
from xtrain.models.source import NotedSource, model_source
from xtrain.plan.layout import Planned
from xtrain.plan.predict import predict
from xtrain.prepare import (
    discarded_on_refusal,
    fill,
    go_on_from,
    going_on,
    has_saved,
    is_new,
    open_directory,
    run_directory,
    run_of,
)
from xtrain.records.metrics import MetricsError
from xtrain.records.progress import Progress
from xtrain.records.record import RankBusy, Status, write_record
from xtrain.records.recorder import Facts, Gathered, Recorder, Silent, gather, make_record, rank_memory
from xtrain.records.rundir import RunDirectory
from xtrain.records.summary import render_summary
from xtrain.records.trackers import open_trackers
from xtrain.relief import about_checkpoint, describe_out_of_memory
from xtrain.request import Request
from xtrain.resume import Start, agreed, find_start
from xtrain.schedule import learning_rate
from xtrain.signals import StopRequest
from xtrain.spec import dump_spec
from xtrain.spec.tree import Spec


def work(request: Request, spec: Spec, choice: Choice, job: Job, stop: StopRequest) -> int:
    """One process's part of a run, from its data to its record; returns the exit code.

    Under `memory: auto` it begins again, with less memory, when the device was full.
    """
    say(job.rank == 0, f"backend {choice.backend.name}: {choice.reason}")
    request = going_on(request)
    made = None
    while True:
        try:
            return _attempt(request, spec, choice, job, stop, made)
        except TooMuch as full:
            say(job.rank == 0, f"note: {full}")
            made = RunDirectory(full.directory)
            if full.begun:  # else it has not yet what it goes on from
                request = replace(request, resume=full.directory, out=None)
        gc.collect()  # the engine, whose parts know each other
        give_back_freed_memory()


def _attempt(
    request: Request, given: Spec, choice: Choice, job: Job, stop: StopRequest, made: RunDirectory | None
) -> int:
    """From the data to the record, with one set of techniques. TooMuch where there is one below it.

    `made` is the directory of an attempt before this one.
    """
    first = job.rank == 0
    with told_to_others(job):
        if request.resume:
            require_folder(request.resume)  # before anything that takes time
        directory = (made or open_directory(request)) if first else None
        fitted = _fit(request, given, choice, job, directory) if given.memory == "auto" else None
    spec = fitted.rung.spec if fitted else given
    guards = Guards(spec.stability) if spec.stability else None
    with directory.lock() if directory else nullcontext():
        with discarded_on_refusal(directory if directory and is_new(directory, request) else None):
            with told_to_others(job):
                data, begin, model, resolved = _prepare(request, spec, choice, job)
            if job.world > 1:
                preflight(job, known(job, spec, data.content_hash), _hang_seconds(spec), partial(say, first))
            before = resident_bytes()
            with (
                _full_devices_told(resolved, choice.backend, begin, directory),
                _less(fitted, job, directory),
            ):
                engine = choice.backend.start(resolved, model, job)
                seed_host(spec.train.seed + job.rank)  # as the engine has just done with torch's
                begin = agreed(engine, begin)
                if begin.checkpoint:
                    restore(engine, begin.checkpoint, guards, job.rank)
            later_notes = (*model.notes, *engine.notes)
            resolved = engine.resolved if isinstance(engine, DecidesLater) else resolved
            resolved = replace(resolved, notes=(*resolved.notes, *later_notes))
            resolved = fitted.noted(resolved) if fitted else resolved
            if directory:  # only now: a request that is refused has changed nothing
                fill(directory, request, resolved, begin, partial(say, first))
        say(first, f"model {model.description}: {engine.parameter_count:,} parameters")
        for note in later_notes:
            say(first, f"note: {note}")
        stop.begin(first)
        try:
            predicted = predict(spec, job.world, choice.backend, data.vocab_size, engine, model.outline)
            facts = Facts(resolved, data, model, engine, predicted)
            run = Run(request, facts, choice.backend, directory, job, begin, guards, before, stop, fitted)
            return run.train()
        finally:
            engine.close()


def _fit(request: Request, spec: Spec, choice: Choice, job: Job, directory: RunDirectory | None) -> Fitted:
    """The techniques of `memory: auto`, the same on every rank."""
    path = directory.path if directory else run_directory(request)
    own = choice.backend.room_bytes(job) if isinstance(choice.backend, Planned) else None
    rooms = [own] if job.world == 1 else everyones(job, "room", own, _hang_seconds(spec))
    room = None if None in rooms else min(rooms)
    fitted = fit(spec, job.world, choice.backend, room, path)
    say(job.rank == 0, fitted.notes[-1])
    return fitted


@contextmanager
def _less(fitted: Fitted | None, job: Job, directory: RunDirectory | None) -> Iterator[None]:
    """Around the making of an engine: under `memory: auto` a full device is a reason to begin again."""
    try:
        yield
    except OutOfMemory as full:
        if fitted and fitted.lower and directory and job.world == 1:
            raise fitted.too_much(full, None, directory.path, begun=False) from None
        raise


def _prepare(
    request: Request, spec: Spec, choice: Choice, job: Job
) -> tuple[Dataset, Start, NotedSource, Resolved]:
    """All that is known without the other processes."""
    first = job.rank == 0
    selected = _select(request, first)
    data = open_data(spec, show_progress=first)
    say(first, f"data {data.description}")
    model = model_source(spec, data.vocab_size, resumed=selected.checkpoint is not None)
    begin = find_start(selected, spec, data.content_hash, model.content_hash, request.allow_changed)
    resolved = choice.backend.resolve(spec, job.world)
    for note in resolved.notes:
        say(first, f"note: {note}")
    return data, begin, model, resolved


@contextmanager
def _full_devices_told(
    resolved: Resolved, backend: Backend, begin: Start, directory: RunDirectory | None
) -> Iterator[None]:
    """A model that does not fit ends the run with a message, before anything of it is written."""
    try:
        yield
    except OutOfMemory as full:
        saved = _saved(begin, directory)
        raise RunFailed(describe_out_of_memory(full, None, resolved, backend, saved)) from full


def _saved(begin: Start, directory: RunDirectory | None) -> str:
    """A sentence on the last checkpoint; empty on the ranks that do not write any."""
    if directory is None:
        return ""
    own = complete_checkpoints(directory.checkpoints)
    last = own[-1] if own else begin.checkpoint
    return about_checkpoint(last.path if last else None)


def _hang_seconds(spec: Spec) -> float | None:
    minutes = spec.launch.hang_minutes
    return None if minutes is None else 60 * minutes


def _select(request: Request, first: bool) -> Selected:
    """The checkpoint that is asked for; damaged ones that were passed over are named."""
    if request.resume is None:
        return Selected(None)
    selected = go_on_from(request.resume, hashes=first)
    for _, reason in selected.damaged:
        say(first, f"warning: {reason}")
    if selected.checkpoint is None:
        RunDirectory.open(run_of(request.resume))  # a run that was not saved yet, or nothing to go on from
    return selected


@dataclass
class Run:
    """One process's engine at work, and what is made of it."""

    request: Request
    facts: Facts
    backend: Backend
    directory: RunDirectory | None
    """Rank 0 has it."""
    job: Job
    begin: Start
    guards: Guards | None
    before: Counter
    stop: StopRequest
    fitted: Fitted | None = None
    """Under `memory: auto`."""

    def train(self) -> int:
        """The loop and, whatever comes of it, the record; returns the exit code."""
        spec, engine = self.facts.resolved.spec, self.facts.engine
        last = min(self.request.stop_after or spec.train.steps, spec.train.steps)
        observer = self._observer(last)
        if self.begin.checkpoint:
            observer.say(f"resumed from {self.begin.checkpoint.path}, after step {self.begin.step}")
            if self.begin.step >= last:
                observer.say(f"nothing to do up to step {last}; set train.steps to go further")
        elif self.request.resume:
            observer.say(f"{self.request.resume} has no checkpoint yet: starting at step 0")
        who = f"rank {self.job.rank} of {self.job.world} on {host_name()}"
        checkpointer = self._checkpointer(observer)
        meter = BusyMeter(engine)
        patience = Patience(_hang_seconds(spec) or inf, spec.launch.grace_seconds or inf)
        leave = partial(self._leave_hanging, checkpointer)
        watchdog = Watchdog(patience, who, lambda: self.stop.requested, leave)
        loop = Loop(
            engine,
            self.facts.data,
            learning_rate(spec),
            observer,
            spec.log.every_steps,
            spec.train.eval_every,
            self.guards,
            watches(spec),
            checkpointer,
            lambda: self.stop.requested,
            audits=not spec.train.compile,
            saves_when_full=self.fitted is not None and self.job.world == 1,
            beat=watchdog.beat,
            look=meter.look,
        )
        started = perf_counter()
        with watchdog:
            ended = self._outcome_of(loop, last)
            checkpointer.close()  # a disk may hang too
        seconds, busy = perf_counter() - started, meter.read()
        observer.close()
        if ended.full is not None and self.fitted and self.fitted.lower:
            self._begin_again(self.fitted, ended.full, loop)
        self._record(ended, seconds, busy, loop)
        if ended.error is not None:
            raise ended.error
        engine.gather(None)  # nobody leaves before rank 0 has written: a launcher may end the others then
        return self._tell(ended)

    def _observer(self, last: int) -> Recorder | Silent:
        if self.directory is None:
            return Silent()
        spec = self.facts.resolved.spec
        progress = Progress(last, self.begin.step, enabled=True, every=spec.log.every_steps)
        trackers = open_trackers(
            spec.log.trackers, self.directory.path, dump_spec(spec), progress.say, self.begin.step + 1
        )
        return Recorder(self.directory, progress, trackers)

    def _checkpointer(self, observer: Recorder | Silent) -> Checkpointer:
        folder = self.directory.checkpoints if self.directory else None
        return Checkpointer(
            self.facts.resolved.spec.checkpoint,
            self.facts.resolved,
            self.facts.data.content_hash,
            self.guards,
            folder,
            observer.say,
            observer.sync,
            self.job.rank,
            last_step=self.begin.step or None,
            best=own_best(self.facts.engine, self.begin.state, folder),
            model_hash=self.facts.model.content_hash,
            files=self.facts.model.files,
            has_saved=self.begin.checkpoint is not None,
        )

    def _outcome_of(self, loop: Loop, last: int) -> Outcome:
        try:
            done = loop.run(self.begin.step, last)
        except OutOfMemory as full:
            saved = _saved(self.begin, self.directory)
            failure = describe_out_of_memory(full, loop.step_memory, self.facts.resolved, self.backend, saved)
            return Outcome("failed", failure, RunFailed(failure), full)
        except KeyboardInterrupt as interrupt:
            return Outcome("interrupted", "left at once", interrupt)
        except RunFailed as error:
            return Outcome("failed", str(error), error)
        except Exception as error:
            return Outcome("failed", f"{type(error).__name__}: {error}", error)
        if done < last:
            return Outcome("interrupted")
        return Outcome("done" if done == self.facts.resolved.spec.train.steps else "stopped")

    def _begin_again(self, fitted: Fitted, full: OutOfMemory, loop: Loop) -> None:
        """One rung down; among several processes, the others wait for this one: the launcher begins again."""
        path = self.directory.path if self.directory else run_directory(self.request)
        less = fitted.too_much(full, loop.saved_when_full, path, begun=True)
        if self.job.world == 1:
            raise less

    def _record(self, ended: Outcome, seconds: float, busy: RankBusy, loop: Loop) -> None:
        memory = rank_memory(self.facts.engine, self.job.rank, self.before, loop)
        # After an error the other ranks may be gone: then only this one's memory is known.
        alone = ended.error is not None
        gathered = Gathered([memory]) if alone else gather(self.facts.engine, memory, busy, loop, seconds)
        if self.directory is None:
            return
        try:
            record = make_record(
                self.facts, self.directory, ended.status, ended.failure, seconds, gathered, self.begin.step
            )
            write_record(self.directory.record, record)
        except (OSError, MetricsError) as error:
            also = f"{ended.failure}; and " if ended.failure else ""
            why = error if isinstance(error, MetricsError) else error.strerror
            raise RunFailed(f"{also}cannot write {self.directory.record}: {why}") from error
        with suppress(OSError):  # a reader that went away changes nothing about the run
            print(render_summary(record, self.directory.path), flush=True)

    def _leave_hanging(self, checkpointer: Checkpointer, reason: str, asked: bool) -> int:
        """Last words of a process that is about to be ended by its watchdog; returns the exit code.

        Of one that was asked to stop it is as if it had saved, where the same command goes on from an earlier
        checkpoint: a scheduler may give it again. Touches no disk: that may be what hangs.
        """
        code = EXIT_INTERRUPTED if asked and checkpointer.has_saved else EXIT_FAILED
        if launched():
            leave_word(self.job.rank, code, reason)  # of a failure the launcher says how to go on
        if self.directory and (code == EXIT_INTERRUPTED or not launched()):
            go_on = self.request.resume_command(self.directory.path, has_saved=False)
            print(f"error: {reason}\ngo on with: {go_on}", file=sys.stderr, flush=True)
        return EXIT_DONE if launched() and code == EXIT_INTERRUPTED else code  # as interrupted workers do

    def _tell(self, ended: Outcome) -> int:
        """How to go on, where there is something left to do."""
        if self.directory and ended.status in ("interrupted", "stopped"):
            command = self.request.resume_command(self.directory.path, has_saved(self.directory))
            print(f"go on with: {command}", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED if ended.status == "interrupted" else EXIT_DONE


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: what the record says of it, and the error to raise once that is written."""

    status: Status
    failure: str | None = None
    error: BaseException | None = None
    full: OutOfMemory | None = None
    """Where a full device was what ended it."""


def say(first: bool, text: str) -> None:
    """For people, from the first rank only."""
    if first:
        print(text, file=sys.stderr, flush=True)
