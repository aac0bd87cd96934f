"""`xtrain run`: decide who runs a spec and with how many processes, then run it or start those that do."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from dataclasses import replace

from xtrain import registry
from xtrain.checkpoints.format import CheckpointError
from xtrain.choose import AUTO, Choice, choose
from xtrain.collection import begin_collecting
from xtrain.contract import Job
from xtrain.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_REQUEST, RequestError, RunFailed, SpecError
from xtrain.fitting import lower_after, read_history
from xtrain.launching.job import join
from xtrain.launching.launch import Ended, start_workers
from xtrain.launching.preflight import ADDRESS, told_to_others
from xtrain.launching.worker import register
from xtrain.prepare import (
    RUN_DIRECTORY,
    go_on_from,
    has_saved,
    is_new,
    open_directory,
    run_directory,
)
from xtrain.records.rundir import RunDirectory
from xtrain.records.trackers import require_installed
from xtrain.request import Request
from xtrain.signals import Interrupted, StopRequest
from xtrain.spec import load_spec, locate, spec_text
from xtrain.spec.tree import Spec
from xtrain.work import work


def run(request: Request) -> int:
    """Train; returns the exit code. Starts the processes that are asked for, or joins a job as one."""
    try:
        with StopRequest() as stop:
            job = None if request.hosts else join(os.environ)
            if job is not None:
                register(job.rank)
            with told_to_others(job):
                processes = _processes(request, job)
                named = None if request.backend == AUTO else registry.load(request.backend)
                resumes = request.resume is not None
                path, text = request.spec_path, spec_text(request.spec_path)
                request = replace(request, spec_text=text)
                spec = load_spec(path, request.overrides, processes, named, resumes=resumes, text=text)
                require_installed(spec.log.trackers)
                _require_named_world(request, spec, job)
                world = processes or spec.launch.processes
                choice = _choose(request, spec, world)
            steps_down = spec.memory == "auto"  # also after a kill, which leaves no last words
            if job is not None or (world == 1 and not request.supervised and not steps_down):
                return work(request, spec, choice, job or Job(), stop)
    except Interrupted as interrupted:
        interrupted.exit_code = _early_exit_code(request, interrupted.exit_code)
        raise
    return _launch(request, choice.backend.name, world, steps_down)  # which takes signals in its own way


def _processes(request: Request, job: Job | None) -> int | None:
    """How many processes the run has, as joined or as asked; None where the spec says it."""
    if job is None:
        return request.processes
    if request.processes not in (None, job.world):
        raise RequestError(
            f"--nproc {request.processes} contradicts the job that this process joined, "
            f"which has {job.world}; leave --nproc out"
        )
    return job.world


def _require_named_world(request: Request, spec: Spec, job: Job | None) -> None:
    """A job of another size than the spec names is a mistake, unless --nproc says that it is meant."""
    named = "launch" in spec.model_fields_set and "processes" in spec.launch.model_fields_set
    if job is None or not named or request.processes is not None or spec.launch.processes == job.world:
        return
    raise RequestError(
        f"launch.processes is {spec.launch.processes}, but the job that this process joined has {job.world}; "
        f"start {spec.launch.processes}, or say --nproc {job.world}"
    )


def _choose(request: Request, spec: Spec, world: int) -> Choice:
    """The backend; where the spec cannot be honoured, the problems with their places in the file."""
    try:
        return choose(request.backend, spec, world, str(request.spec_path))
    except SpecError as error:
        elsewhere = None if world == spec.launch.processes else world
        located = locate(error.problems, request.spec_path, request.overrides, elsewhere, request.spec_text)
        raise SpecError(error.source, located) from None


def _launch(request: Request, backend: str, world: int, steps_down: bool) -> int:
    """Start this host's workers and wait; nothing is left of a run that did not begin.

    A run that `steps_down` begins again with less memory where that was too short.
    """
    begin_collecting()
    directory, processes = _share(request, world)
    own = not request.hosts and is_new(directory, request)
    try:
        request, ended = _watch(request, backend, world, directory, processes, steps_down)
        return _exit_code(request, directory, ended)
    finally:
        if own and not directory.resolved.exists():
            shutil.rmtree(directory.path, ignore_errors=True)


def _watch(
    request: Request, backend: str, world: int, directory: RunDirectory, processes: int, steps_down: bool
) -> tuple[Request, Ended]:
    """How the last attempt ended, and what it was asked for."""
    environ = dict(os.environ)
    if request.hosts is None:
        environ[RUN_DIRECTORY] = str(directory.path.absolute())
    elif request.hosts.address:
        environ[ADDRESS] = request.hosts.address
    while True:
        failures, filled_before = len(read_history(directory.path)), _filled_at_ns(directory)
        arguments = request.worker_arguments(backend, world)
        ended = start_workers(
            arguments, processes, environ, max_restarts=request.max_restarts, hosts=request.hosts
        )
        filled = _filled_at_ns(directory)
        waits = filled is not None or not request.hosts  # else its directory is not taken a second time
        if not (steps_down and waits and lower_after(ended, directory.path, failures)):
            return request, ended
        print(f"note: {ended.message}\nnote: it begins again with less memory", file=sys.stderr, flush=True)
        if filled != filled_before:  # else it has not yet gone back to what --resume names
            request = replace(request, resume=directory.path, out=None)


def _exit_code(request: Request, directory: RunDirectory, ended: Ended) -> int:
    """Of a launch; an error says how to go on, where the run began."""
    if ended.code in (EXIT_DONE, EXIT_INTERRUPTED) and not ended.message:
        return ended.code
    began = directory.resolved.exists()
    command = request.resume_command(directory.path, has_saved(directory))
    go_on = f"\ngo on with: {command}" if began else ""
    message = f"{ended.message}{go_on}"
    if ended.signalled:
        raise Interrupted(ended.code if began else _early_exit_code(request, ended.code), message)
    if ended.code == EXIT_INTERRUPTED and began:
        raise Interrupted(ended.code, message)
    raise (RequestError if ended.code == EXIT_REQUEST else RunFailed)(message)


def _filled_at_ns(directory: RunDirectory) -> int | None:
    """When the last attempt that began wrote down what it does; None where there was none."""
    with suppress(OSError):
        return directory.resolved.stat().st_mtime_ns
    return None


def _share(request: Request, world: int) -> tuple[RunDirectory, int]:
    """The run directory, and how many of the processes are started on this host."""
    hosts = request.hosts
    if hosts is None:
        return open_directory(request), world
    if world % hosts.count:
        raise RequestError(
            f"{world} processes on {hosts.count} hosts: expected a multiple of {hosts.count}, as every host "
            "has equally many; change --nproc or launch.processes"
        )
    if request.out is None and request.resume is None:
        raise RequestError("a run on several hosts needs --out, a folder that all of them see")
    return RunDirectory(run_directory(request)), world // hosts.count


def _early_exit_code(request: Request, code: int) -> int:
    """Where the same command goes on from a checkpoint, a scheduler may give it again."""
    with suppress(CheckpointError):
        if request.resume and go_on_from(request.resume, hashes=False).checkpoint:
            return EXIT_INTERRUPTED
    return code
