"""One process's engine at work: the loop, what watches it, and the record of what came of it."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf
from time import perf_counter

from xtrain.checkpoints.format import complete_checkpoints
from xtrain.checkpoints.manager import Checkpointer, own_best
from xtrain.contract import Backend, Counter, Job, OutOfMemory
from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, RunFailed
from xtrain.fitting import Fitted
from xtrain.guards import Guards, watches
from xtrain.launching.preflight import host_name
from xtrain.launching.watchdog import Patience, Watchdog
from xtrain.launching.worker import launched, leave_word
from xtrain.loop import Loop
from xtrain.measure.busy import BusyMeter
from xtrain.prepare import has_saved
from xtrain.records.metrics import MetricsError
from xtrain.records.progress import Progress
from xtrain.records.record import RankBusy, Status, write_record
from xtrain.records.recorder import Facts, Gathered, Recorder, Silent, gather, make_record, rank_memory
from xtrain.records.rundir import RunDirectory
from xtrain.records.summary import render_summary
from xtrain.records.trackers import open_trackers
from xtrain.relief import about_checkpoint, describe_out_of_memory
from xtrain.request import Request
from xtrain.resume import Start
from xtrain.schedule import learning_rate
from xtrain.signals import StopRequest
from xtrain.spec import dump_spec
from xtrain.spec.tree import Spec


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

    @cached_property
    def last_step(self) -> int:
        """Where this process is to stop."""
        steps = self.facts.resolved.spec.train.steps
        return min(self.request.stop_after or steps, steps)

    def train(self) -> int:
        """The loop and, whatever comes of it, the record; returns the exit code."""
        observer = self._observer()
        self._tell_where_it_begins(observer)
        checkpointer = self._checkpointer(observer)
        meter = BusyMeter(self.facts.engine)
        watchdog = self._watchdog(checkpointer)
        loop = self._loop(observer, checkpointer, watchdog, meter)
        started = perf_counter()
        with watchdog:
            ended = self._outcome_of(loop)
            checkpointer.close()  # a disk may hang too
        seconds, busy = perf_counter() - started, meter.read()
        observer.close()
        if ended.full is not None and self.fitted and self.fitted.lower:
            self._begin_again(self.fitted, ended.full, loop)
        self._record(ended, seconds, busy, loop)
        if ended.error is not None:
            raise ended.error
        # Nobody leaves before rank 0 has written: a launcher may end the others then.
        self.facts.engine.gather(None)
        return self._tell(ended)

    def _tell_where_it_begins(self, observer: Recorder | Silent) -> None:
        if self.begin.checkpoint:
            observer.say(f"resumed from {self.begin.checkpoint.path}, after step {self.begin.step}")
            if self.begin.step >= self.last_step:
                observer.say(f"nothing to do up to step {self.last_step}; set train.steps to go further")
        elif self.request.resume:
            observer.say(f"{self.request.resume} has no checkpoint yet: starting at step 0")

    def _loop(
        self, observer: Recorder | Silent, checkpointer: Checkpointer, watchdog: Watchdog, meter: BusyMeter
    ) -> Loop:
        spec = self.facts.resolved.spec
        return Loop(
            self.facts.engine,
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

    def _watchdog(self, checkpointer: Checkpointer) -> Watchdog:
        spec = self.facts.resolved.spec
        patience = Patience(hang_seconds(spec) or inf, spec.launch.grace_seconds or inf)
        who = f"rank {self.job.rank} of {self.job.world} on {host_name()}"
        leave = partial(self._leave_hanging, checkpointer)
        return Watchdog(patience, who, lambda: self.stop.requested, leave)

    def _observer(self) -> Recorder | Silent:
        if self.directory is None:
            return Silent()
        spec = self.facts.resolved.spec
        progress = Progress(self.last_step, self.begin.step, spec.log.every_steps)
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

    def _outcome_of(self, loop: Loop) -> Outcome:
        try:
            done = loop.run(self.begin.step, self.last_step)
        except OutOfMemory as full:
            saved = about_saved(self.begin, self.directory)
            failure = describe_out_of_memory(full, loop.step_memory, self.facts.resolved, self.backend, saved)
            return Outcome("failed", failure, RunFailed(failure), full)
        except KeyboardInterrupt as interrupt:
            return Outcome("interrupted", "left at once", interrupt)
        except RunFailed as error:
            return Outcome("failed", str(error), error)
        except Exception as error:
            return Outcome("failed", f"{type(error).__name__}: {error}", error)
        if done < self.last_step:
            return Outcome("interrupted")
        return Outcome("done" if done >= self.facts.resolved.spec.train.steps else "stopped")

    def _begin_again(self, fitted: Fitted, full: OutOfMemory, loop: Loop) -> None:
        """One rung down; among several processes, the others wait for this one: the launcher begins again."""
        less = fitted.too_much(full, loop.saved_when_full, begun=True)
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


def about_saved(begin: Start, directory: RunDirectory | None) -> str:
    """A sentence on the last checkpoint; empty on the ranks that do not write any."""
    if directory is None:
        return ""
    own = complete_checkpoints(directory.checkpoints)
    last = own[-1] if own else begin.checkpoint
    return about_checkpoint(last.path if last else None)


def hang_seconds(spec: Spec) -> float | None:
    minutes = spec.launch.hang_minutes
    return None if minutes is None else 60 * minutes
