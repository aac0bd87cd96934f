"""The run directory of a request: made, found or told, and filled with what is known before step 1."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from xtrain.checkpoints.format import CheckpointError, complete_checkpoints, is_checkpoint_name
from xtrain.checkpoints.select import Selected, select, set_aside, set_aside_after
from xtrain.contract import Resolved
from xtrain.errors import RequestError, RunFailed
from xtrain.fitting import TooMuch
from xtrain.records.metrics import MetricsError, MetricsLog
from xtrain.records.rundir import RunDirectory, write_json, write_text
from xtrain.request import Request
from xtrain.resume import Start
from xtrain.spec import dump_spec

RUN_DIRECTORY = "XTRAIN_RUN_DIRECTORY"
"""Tells workers which directory their launcher made for them."""


def fill(
    directory: RunDirectory, request: Request, resolved: Resolved, begin: Start, say: Callable[[str], None]
) -> None:
    """Write down what is known before the first step. The directory must be locked.

    Raises RunFailed where it cannot be written.
    """
    try:
        _fill(directory, request, resolved, begin, say)
    except OSError as error:
        raise RunFailed(f"cannot write in {directory.path}: {error.strerror}") from error


def _fill(
    directory: RunDirectory, request: Request, resolved: Resolved, begin: Start, say: Callable[[str], None]
) -> None:
    if request.resume:
        _go_on(directory, run_of(request.resume), begin, say)
    as_given = request.spec_text
    write_text(directory.spec, request.spec_path.read_text("utf-8") if as_given is None else as_given)
    write_json(
        directory.resolved,
        {
            "backend": resolved.backend,
            "world": resolved.world,
            "overrides": list(request.overrides),
            "spec": dump_spec(resolved.spec),
            "settings": resolved.settings,
            "notes": list(resolved.notes),
            "start": start_id(),
            "began_from": _elsewhere(directory, begin),
            "began_after": begin.step,
        },
    )
    for name, content in resolved.files.items():
        write_json(directory.path / name, content)


def _elsewhere(directory: RunDirectory, begin: Start) -> str | None:
    """The checkpoint that this run begins from, where it is another run's: `go_on_from` needs it."""
    if begin.checkpoint is None:
        return None
    path = begin.checkpoint.path.resolve()
    return None if path.parent == directory.checkpoints.resolve() else str(path)


def go_on_from(resume: Path, hashes: bool) -> Selected:
    """What `select` finds; where a run has no checkpoint yet, the one of another run that it began from.

    Raises CheckpointError as `select` does, and where that other checkpoint is gone or damaged.
    """
    found = select(resume, hashes)
    run = run_of(resume)
    origin = None if found.checkpoint else _written_down(run, "began_from")
    if not isinstance(origin, str):
        return found
    try:
        return select(Path(origin), hashes)
    except CheckpointError as error:
        raise CheckpointError(
            f"{run} has no checkpoint yet and began from another run's, which cannot be gone on from:\n"
            f"  {error}\n  Bring it back, or begin anew: --resume CHECKPOINT --out DIR"
        ) from error


def going_on(request: Request) -> Request:
    """The request of a worker that was started again: it goes on with what its launch has saved so far."""
    start = start_id()
    if start is None or not (RUN_DIRECTORY in os.environ or request.out or request.resume):
        return request
    path = run_directory(request)
    if _begun_by(path) != start:
        return request
    if request.resume is None or complete_checkpoints(path / "checkpoints"):
        return replace(request, resume=path, out=None)
    os.environ[RUN_DIRECTORY] = str(path)  # nothing saved yet: begin once more where it was told to
    return request


def has_saved(directory: RunDirectory) -> bool:
    """Whether there is a checkpoint of what was trained since the run directory was last filled."""
    began_after = _written_down(directory.path, "began_after")
    saved = complete_checkpoints(directory.checkpoints)
    return isinstance(began_after, int) and bool(saved) and saved[-1].step > began_after


def start_id() -> str | None:
    """The word that all processes of one start share, restarts included; None where torchrun has none."""
    found = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if found == "none" else found


def _begun_by(path: Path) -> str | None:
    """The start that this run directory was last filled for."""
    found = _written_down(path, "start")
    return found if isinstance(found, str) else None


def _written_down(path: Path, key: str) -> object:
    """What this run directory's resolved.json says; None where it does not."""
    with suppress(OSError, ValueError, AttributeError):
        found: object = json.loads((path / "resolved.json").read_text(encoding="utf-8")).get(key)
        return found
    return None


def run_directory(request: Request) -> Path:
    """Where the run of a request with a folder is written."""
    if made := os.environ.get(RUN_DIRECTORY):
        return Path(made)
    if request.out:
        return request.out
    return run_of(request.resume)


def open_directory(request: Request) -> RunDirectory:
    """Made by the launcher, or the one that is resumed, or a new one."""
    if made := os.environ.get(RUN_DIRECTORY):
        return RunDirectory.open(Path(made))
    if request.resume and not request.out:
        return _run_to_go_on(request.resume)
    return RunDirectory.create(request.out, request.spec_path.stem)


def _run_to_go_on(resume: Path) -> RunDirectory:
    if is_checkpoint_name(resume.name) and resume.is_dir() and resume.parent.name != "checkpoints":
        raise RequestError(
            f"--resume {resume}: found a checkpoint outside of a run's checkpoints; it can "
            "only go on elsewhere: add --out DIR"
        )
    return RunDirectory.open(run_of(resume))


def has_launcher() -> bool:
    """Whether a launcher made the run directory: it begins again in there, or removes it if nothing began."""
    return RUN_DIRECTORY in os.environ


def is_new(directory: RunDirectory, request: Request) -> bool:
    """Whether it was made for this request, and goes when the request is refused."""
    return request.resume is None or directory.path.resolve() != run_of(request.resume).resolve()


def _go_on(directory: RunDirectory, before: Path, begin: Start, say: Callable[[str], None]) -> None:
    """Leave of the run so far, which may be in another directory, what led up to the start."""
    log = MetricsLog(directory.metrics)
    if directory.path.resolve() == before.resolve():
        complete = _cut(directory, log, begin, say)
    else:
        complete = _copy(before / directory.metrics.name, log, begin.step)
    if not complete:
        say(f"warning: there are no metrics of the steps up to {begin.step}: the record will lack them")


def _cut(directory: RunDirectory, log: MetricsLog, begin: Start, say: Callable[[str], None]) -> bool:
    """Leave the checkpoints and lines up to the start; returns whether there are such lines.

    The lines go last: a checkpoint that lost its lines could not be gone on from, if this is cut short.
    """
    try:
        log.require(begin.step)
        if aside := set_aside([checkpoint for checkpoint, _ in begin.damaged], "damaged"):
            say(f"damaged checkpoints are kept in {aside}")
        set_aside_after(directory.checkpoints, begin.step)
        return log.truncate_after(begin.step)
    except MetricsError as error:
        raise MetricsError(
            f"{error}; move it away to go on without its lines, or go on in another directory with --out"
        ) from None


def _copy(source: Path, log: MetricsLog, step: int) -> bool:
    with suppress(FileNotFoundError):
        shutil.copy(source, log.path)
    try:
        return log.truncate_after(step)
    except MetricsError:  # lines are missing there: better none here than some
        log.path.unlink()
        return False


def run_of(resume: Path | None) -> Path:
    """The run directory of `--resume PATH`, which may name its checkpoints or one of them."""
    if resume is None:
        raise AssertionError("neither --out nor --resume: refused before")
    if resume.name == "checkpoints":
        return resume.parent
    return resume.parent.parent if resume.parent.name == "checkpoints" else resume


@contextmanager
def discarded_on_refusal(directory: RunDirectory | None) -> Iterator[None]:
    """A run that did not begin, whatever stopped it, leaves no directory behind."""
    try:
        yield
    except TooMuch:
        raise  # it begins again in there
    except BaseException:
        if directory is not None:
            shutil.rmtree(directory.path, ignore_errors=True)
        raise
