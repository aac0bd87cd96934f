"""The training loop: the only copy, whatever the backend.

One turn: take the step's batch by address, let the engine take one optimizer step, and now and then
bring a window of results to the host, evaluate. Nothing here knows a device; losses stay where they
are until a window closes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from time import perf_counter
from traceback import clear_frames
from typing import Any, Protocol

from xtrain.checkpoints.manager import Checkpointer
from xtrain.contract import Engine, OutOfMemory, StepInput, StepMemory, StepResult, Trace
from xtrain.data import Dataset
from xtrain.errors import RunFailed
from xtrain.guards import Guards, Watch
from xtrain.measure.machine import resident_bytes
from xtrain.measure.trace import NullTrace, SampledTrace, is_audited, is_traced
from xtrain.records.metrics import StepRecord

WARMUP_STEPS = 3
"""Updates left out of the speed figures: allocators, kernels and caches settle in them."""


class Observer(Protocol):
    """Takes down what the loop saw (xtrain/records/recorder.py)."""

    def saw(self, record: StepRecord) -> None: ...


@dataclass
class Window:
    """Steps whose results are still on the device."""

    learning_rates: list[float] = field(default_factory=list)
    results: list[StepResult] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """As the host saw them: on an asynchronous device the wait comes with the window's end."""


@dataclass
class Loop:
    """Takes the updates with 0-based index `start` to `stop` - 1, or fewer when asked to stop."""

    engine: Engine
    data: Dataset
    learning_rate: Callable[[int], float]
    observer: Observer
    window_steps: int
    eval_every: int = 0
    guards: Guards | None = None
    watches: Sequence[Watch] = ()
    checkpointer: Checkpointer | None = None
    asked_to_stop: Callable[[], bool] = lambda: False
    """Of this process; the ranks agree on it."""
    audits: bool = True
    """Whether the ledger takes the first steps: it sees no tensor that compiled code makes."""
    beat: Callable[[], None] = lambda: None
    """Called at every step: the loop is alive (xtrain/launching/watchdog.py)."""
    look: Callable[[], None] = lambda: None
    """Called at the ends of windows: how busy is the device (xtrain/measure/busy.py)?"""
    saves_when_full: bool = False
    """Whether a step that did not fit leaves a checkpoint of the updates before it."""
    saved_when_full: int | None = None
    """How many these were."""
    peak_live_bytes: int | None = None
    """The most that a traced step sampled; None where the device cannot tell."""
    step_memory: StepMemory | None = None
    """Of the last audited step."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Of this rank's traced steps together."""

    def run(self, start: int, stop: int) -> int:
        """Returns the number of updates done, all saved where there is a checkpointer."""
        window = Window()
        done = start
        while done < stop:
            traced = is_traced(done - start, stop - start)
            if traced:
                self._close(window)  # a traced step waits for the device at every span: it stands alone
            self.beat()
            trace = SampledTrace(self.engine.synchronize, self._live_bytes) if traced else NullTrace()
            with self._saving_when_full(done, window):
                if self.audits and is_audited(done - start, stop - start) and self.engine.holdings():
                    self._audited_step(done, window)
                else:
                    self._step(done, window, trace)
            done += 1
            stopping = self.engine.any(self.asked_to_stop() or self._save_failed())
            ending = stopping or done == stop or (self.guards is not None and self.guards.exhausted)
            settling = done - start <= WARMUP_STEPS
            full = traced or ending or settling or done % self.window_steps == 0
            saving = ending or self._due(done, full)
            evaluating = self.eval_every > 0 and (done % self.eval_every == 0 or done == stop)
            if full or saving or evaluating:
                self._close(window, trace if isinstance(trace, SampledTrace) else None, evaluating)
            if self.guards:
                self.guards.check()
            if self.checkpointer is not None and (saving or self.checkpointer.is_best(done)):
                self.checkpointer.save(self.engine, done, last=ending)
            if stopping:
                break
        return done

    @contextmanager
    def _saving_when_full(self, done: int, window: Window) -> Iterator[None]:
        """Around a step: where it finds no room and the weights are whole, `done` updates are saved."""
        try:
            yield
        except OutOfMemory as full:
            if self.saves_when_full and full.moment == "step" and done > 0 and self.checkpointer is not None:
                for error in (full, full.__cause__):  # what the step held is let go of first
                    clear_frames(error.__traceback__ if error else None)
                with suppress(RunFailed, RuntimeError, MemoryError):  # then an earlier checkpoint has to do
                    self._close(window)
                    self.checkpointer.save(self.engine, done, last=True)
                    self.saved_when_full = done
            raise

    def _save_failed(self) -> bool:
        """Whether a save in the background failed, where that ends the run: then the last one says so."""
        return self.checkpointer is not None and self.checkpointer.failed_since()

    def _due(self, done: int, window_is_full: bool) -> bool:
        if self.checkpointer is None:
            return False
        overdue = window_is_full and self.checkpointer.overdue(self.engine)
        return overdue or self.checkpointer.due(done)

    def _step(self, step: int, window: Window, trace: Trace) -> None:
        started = perf_counter()
        with trace.span("data"):
            micro_batches = self.data.micro_batches(step, self.engine.data_rank, self.engine.data_size)
            target_tokens = self.data.target_tokens(step)
        lr = self.learning_rate(step)
        accept = self.guards.accept if self.guards else None
        result = self.engine.train_step(StepInput(step, micro_batches, lr, target_tokens), accept, trace)
        window.results.append(result)
        window.learning_rates.append(lr)
        window.seconds.append(perf_counter() - started)

    def _audited_step(self, step: int, window: Window) -> None:
        """A step under the ledger. It computes the same, but its time means nothing: speed leaves it out."""
        from xtrain.measure.ledger import Ledger

        ledger, finished = Ledger(self.engine.holdings), False
        try:
            with ledger.open():
                self._step(step, window, ledger)
            finished = True
        finally:  # where the device is full, what filled it is wanted most
            self.step_memory = StepMemory(step + 1, ledger.peaks, finished)

    def _close(self, window: Window, trace: SampledTrace | None = None, evaluating: bool = False) -> None:
        """Bring the window to the host, hand it to the observer, empty it."""
        if not window.results:
            return
        started = perf_counter()
        values = self.engine.fetch(window.results)
        window.seconds[-1] += perf_counter() - started
        if self.engine.asynchronous:
            mean = sum(window.seconds) / len(window.seconds)
            window.seconds = [mean] * len(window.seconds)
        records = [
            StepRecord(
                step=value.step + 1,
                loss=value.loss,
                lr=lr,
                grad_norm=value.grad_norm,
                tokens=result.target_tokens,
                seconds=seconds,
                skipped=value.skipped,
                loss_scale=value.loss_scale,
            )
            for value, lr, result, seconds in zip(
                values, window.learning_rates, window.results, window.seconds, strict=True
            )
        ]
        records[-1] = replace(records[-1], **self._at_window_end(trace, evaluating))
        for record in records:
            self.observer.saw(record)
        if self.checkpointer:
            self.checkpointer.evaluated(records[-1].step, records[-1].eval_loss)
        for phase, seconds in (trace.seconds if trace else {}).items():
            self.phase_seconds[phase] = self.phase_seconds.get(phase, 0.0) + seconds
        if trace and trace.peak_live_bytes is not None:
            self.peak_live_bytes = max(trace.peak_live_bytes, self.peak_live_bytes or 0)
        for watch in self.watches:
            for value in values:
                watch.check(value)
        window.results.clear()
        window.learning_rates.clear()
        window.seconds.clear()

    def _at_window_end(self, trace: SampledTrace | None, evaluating: bool) -> dict[str, Any]:
        """What is looked at once per window."""
        self.look()
        memory = self.engine.memory()
        return {
            "live_bytes": memory.live.bytes if memory.live else None,
            "reserved_bytes": memory.reserved.bytes if memory.reserved else None,
            "rss_bytes": resident_bytes().bytes,
            "spans": dict(trace.seconds) if trace else None,
            "eval_loss": self._evaluate() if evaluating else None,
        }

    def _evaluate(self) -> float | None:
        """Mean token loss over the held-out part; None when nothing is held out."""
        batches = self.data.held_out(self.engine.data_rank, self.engine.data_size)
        total = self.engine.evaluate(batches)
        return total.total / total.tokens if total.tokens else None

    def _live_bytes(self) -> int | None:
        live = self.engine.memory().live
        return live.bytes if live else None
