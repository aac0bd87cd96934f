"""`xtrain run`: decide who runs a spec and with how many processes, then run it or start those that do."""

from __future__ import annotations

import os
import shutil

from xtrain.choose import choose
from xtrain.contract import Job
from xtrain.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_REQUEST, RequestError, RunFailed
from xtrain.job import join
from xtrain.launch import start_workers
from xtrain.prepare import RUN_DIRECTORY, is_new, open_directory
from xtrain.request import Request
from xtrain.spec import load_spec
from xtrain.spec.tree import Spec
from xtrain.trackers import require_installed
from xtrain.work import work
from xtrain.worker import register


def run(request: Request) -> int:
    """Train; returns the exit code. Starts the processes that are asked for, or joins a job as one."""
    job = join(os.environ)
    if job is not None:
        register(job.rank)
    spec = load_spec(request.spec_path, request.overrides)
    require_installed(spec.log.trackers)
    world = _world(request, spec, job)
    choice = choose(request.backend, spec, world, str(request.spec_path))
    if job is None and world > 1:
        return _launch(request, choice.backend.name, world)
    return work(request, spec, choice, job or Job())


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
    directory = open_directory(request)
    environ = {**os.environ, RUN_DIRECTORY: str(directory.path.absolute())}
    ended = start_workers(request.worker_arguments(backend, world), world, environ)
    began = directory.resolved.exists()
    if not began and is_new(directory, request):
        shutil.rmtree(directory.path, ignore_errors=True)
    if ended.code in (EXIT_DONE, EXIT_INTERRUPTED):
        return ended.code
    go_on = f"\ngo on with: {request.resume_command(directory.path)}" if began else ""
    raise (RequestError if ended.code == EXIT_REQUEST else RunFailed)(f"{ended.message}{go_on}")
