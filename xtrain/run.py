"""`xtrain run`: from a spec to a finished run directory."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from xtrain.choose import Choice, choose
from xtrain.contract import Counter, Job, OutOfMemory, Resolved
from xtrain.data import open_data
from xtrain.errors import EXIT_DONE, RequestError, RunFailed
from xtrain.job import join
from xtrain.launch import start_workers
from xtrain.loop import Loop
from xtrain.machine import resident_bytes
from xtrain.models.source import model_source
from xtrain.progress import Progress
from xtrain.record import Status, complete_spec, write_record
from xtrain.recorder import Facts, Recorder, Silent, gather_memory, make_record, rank_memory
from xtrain.rundir import RunDirectory, write_json, write_text
from xtrain.schedule import learning_rate
from xtrain.spec import load_spec
from xtrain.spec.tree import Spec
from xtrain.summary import format_bytes, render_summary

RUN_DIRECTORY = "XTRAIN_RUN_DIRECTORY"
"""Tells workers which directory their launcher made for them."""


@dataclass(frozen=True)
class Request:
    """What was asked for on the command line."""

    spec_path: Path
    backend: str = "auto"
    out: Path | None = None
    processes: int | None = None
    overrides: tuple[str, ...] = ()


def run(request: Request) -> int:
    """Train; returns the exit code. Starts the processes that are asked for, or joins a job as one."""
    job = join(os.environ)
    spec = load_spec(request.spec_path, request.overrides)
    world = _world(request, spec, job)
    choice = choose(request.backend, spec, world, str(request.spec_path))
    if job is None and world > 1:
        return _launch(request, choice.backend.name, world)
    return work(request, spec, choice, job or Job())


def work(request: Request, spec: Spec, choice: Choice, job: Job) -> int:
    """One process's part of a run, from its data to its record."""
    first = job.rank == 0
    say(first, f"backend {choice.backend.name}: {choice.reason}")
    data = open_data(spec, show_progress=first)
    say(first, f"data {data.description}")
    model = model_source(spec, data.vocab_size)
    resolved = choice.backend.resolve(spec, job.world)
    for note in resolved.notes:
        say(first, f"note: {note}")
    directory = _prepare(request, resolved) if first else None
    with directory.lock() if directory else nullcontext():
        before = resident_bytes()
        with _discarded_on_refusal(directory):
            engine = choice.backend.start(resolved, model, job)
        say(first, f"model {model.description}: {engine.parameter_count:,} parameters")
        try:
            _train(Facts(resolved, data, model, engine), directory, job.rank, before)
        finally:
            engine.close()
    return EXIT_DONE


def _train(facts: Facts, directory: RunDirectory | None, rank: int, before: Counter) -> None:
    """The loop and, whatever comes of it, the record; rank 0 has the directory."""
    spec, engine = facts.resolved.spec, facts.engine
    progress = Progress(spec.train.steps, 0, enabled=directory is not None, every=spec.log.every_steps)
    observer = Recorder(directory, progress) if directory else Silent()
    loop = Loop(
        engine, facts.data, learning_rate(spec), observer, spec.log.every_steps, spec.train.eval_every
    )
    started = perf_counter()
    status, failure, error = _outcome_of(lambda: loop.run(0, spec.train.steps))
    seconds = perf_counter() - started
    observer.close()
    memory = rank_memory(engine, rank, before, loop.peak_live_bytes)
    ranks = gather_memory(engine, memory) if error is None else [memory]
    if directory is not None:
        record = make_record(facts, directory, status, failure, seconds, ranks)
        write_record(directory.record, record)
        print(render_summary(record, directory.path), flush=True)
    if error is not None:
        raise error


def _outcome_of(train: Callable[[], None]) -> tuple[Status, str | None, BaseException | None]:
    """Run it; what the record says of it, and the error to raise once the record is written."""
    try:
        train()
    except OutOfMemory as full:
        failure = _describe_out_of_memory(full)
        return "failed", failure, RunFailed(failure)
    except KeyboardInterrupt as interrupt:
        return "interrupted", None, interrupt
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}", error
    return "done", None, None


def _prepare(request: Request, resolved: Resolved) -> RunDirectory:
    """The run directory, with everything in it that is known before the first step."""
    made = os.environ.get(RUN_DIRECTORY)
    directory = (
        RunDirectory.open(Path(made)) if made else RunDirectory.create(request.out, request.spec_path.stem)
    )
    write_text(directory.spec, request.spec_path.read_text(encoding="utf-8"))
    write_json(
        directory.resolved,
        {
            "backend": resolved.backend,
            "world": resolved.world,
            "overrides": list(request.overrides),
            "spec": complete_spec(resolved.spec),
            "settings": resolved.settings,
            "notes": list(resolved.notes),
        },
    )
    for name, content in resolved.files.items():
        write_json(directory.path / name, content)
    return directory


@contextmanager
def _discarded_on_refusal(directory: RunDirectory | None) -> Iterator[None]:
    """A run that was refused before it began leaves no directory behind."""
    try:
        yield
    except RequestError:
        if directory is not None:
            shutil.rmtree(directory.path)
        raise


def _world(request: Request, spec: Spec, job: Job | None) -> int:
    """How many processes the run has: as joined, as asked, or as the spec says."""
    if job is None:
        return request.processes or spec.launch.processes
    if request.processes not in (None, job.world):
        raise RequestError(
            f"--nproc {request.processes} contradicts the job that this process joined, "
            f"which has {job.world}; leave --nproc out"
        )
    return job.world


def _launch(request: Request, backend: str, world: int) -> int:
    """Start the workers in a directory made for them; nothing is left of one that did not begin."""
    directory = RunDirectory.create(request.out, request.spec_path.stem)
    arguments = ["run", str(request.spec_path), "--backend", backend]
    for override in request.overrides:
        arguments += ["--set", override]
    try:
        return start_workers(
            arguments, world, environ={**os.environ, RUN_DIRECTORY: str(directory.path.absolute())}
        )
    finally:
        if not directory.resolved.exists():
            shutil.rmtree(directory.path)


def _describe_out_of_memory(full: OutOfMemory) -> str:
    categories = full.memory.categories or {}
    table = ", ".join(f"{name} {format_bytes(held)}" for name, held in categories.items())
    return (
        f"{full}; it held {table or 'an unknown amount'}. "
        "Try a smaller batch.micro (the global batch and what is learned stay the same)"
    )


def say(first: bool, text: str) -> None:
    """For people, from the first rank only."""
    if first:
        print(text, file=sys.stderr, flush=True)
