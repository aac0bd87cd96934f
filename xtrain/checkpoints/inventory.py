"""What lies in a run's checkpoints folder: for people who look, and for those who clear up."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xtrain.checkpoints.format import Checkpoint, CheckpointError, complete_checkpoints, is_checkpoint_name
from xtrain.checkpoints.select import prune, select
from xtrain.contract import JSON
from xtrain.errors import RunFailed
from xtrain.records.rundir import RunDirectory

ASIDE = ("superseded-*", "damaged-*")


@dataclass(frozen=True)
class Entry:
    """One checkpoint, as far as it can be told without reading it all."""

    path: str
    step: int
    bytes: int
    """Of all files in its folder."""
    backend: str | None
    """None, as the world, when state.json cannot be read."""
    world: int | None
    aside: bool
    """Not among those that a run goes on from."""
    wrong: str
    """What is wrong with it; empty when nothing is."""

    def as_json(self) -> dict[str, JSON]:
        return asdict(self)


def found_at(path: Path, aside: bool = True) -> list[Checkpoint]:
    """The checkpoint that `path` is, or all of a run directory, oldest first, then those kept aside.

    Raises CheckpointError when there is none.
    """
    if is_checkpoint_name(path.name):
        found = [one for one in complete_checkpoints(path.parent) if one.path.name == path.name]
    else:
        folder = checkpoints_folder(path)
        found = complete_checkpoints(folder)
        kept = sorted(other for pattern in ASIDE for other in folder.glob(pattern)) if aside else []
        found += [one for other in kept for one in complete_checkpoints(other)]
    if not found:
        what = "has no checkpoints" if path.is_dir() else "is a file" if path.exists() else "is not there"
        raise CheckpointError(f"{path} {what}; expected a run directory or one of its checkpoints")
    return found


def checkpoints_folder(path: Path) -> Path:
    """Of a run directory, or the folder itself."""
    return path if path.name == "checkpoints" else path / "checkpoints"


def entry(checkpoint: Checkpoint) -> Entry:
    wrong, state = "", None
    try:
        checkpoint.check(hashes=False)
        state = checkpoint.state()
    except CheckpointError as error:
        wrong = str(error)
    size = sum(file.stat().st_size for file in checkpoint.path.iterdir() if file.is_file())
    aside = checkpoint.path.parent.name.startswith(tuple(pattern.rstrip("*") for pattern in ASIDE))
    backend, world = (state.backend, state.world) if state else (None, None)
    return Entry(str(checkpoint.path), checkpoint.step, size, backend, world, aside, wrong)


def damage(checkpoint: Checkpoint) -> list[str]:
    """Every byte held against the manifest; a sentence for each thing that is wrong."""
    try:
        if found := list(checkpoint.damage(hashes=True)):
            return found
        checkpoint.check(hashes=False)
    except CheckpointError as error:
        return [str(error)]
    return []


def has_hashes(checkpoint: Checkpoint) -> bool:
    """Whether contents can be checked at all: the first format had no hashes."""
    return all(facts.sha256 for facts in checkpoint.manifest.files.values())


def newest(path: Path) -> Checkpoint:
    """The checkpoint that `path` is, or the newest valid one of a run directory, every byte checked."""
    found_at(path, aside=False)
    selected = select(path, hashes=True)
    for _, reason in selected.damaged:
        print(f"warning: passed over: {reason}", file=sys.stderr)
    assert selected.checkpoint is not None
    return selected.checkpoint


def details(checkpoint: Checkpoint) -> dict[str, JSON]:
    """What a checkpoint holds beside its tensors' values; every byte was checked before."""
    state, reader = checkpoint.state(), checkpoint.reader("np")
    shapes: dict[str, Any] = {name: reader.shape(name, "weight") for name in reader.keys("weight")}
    kinds = sorted({key.split("/", 1)[0] for key in reader.keys("exp_avg")})
    return {
        **entry(checkpoint).as_json(),
        "format_version": checkpoint.manifest.format_version,
        "moments": kinds,
        "files": {name: facts.bytes for name, facts in checkpoint.manifest.files.items()},
        "data_hash": state.data_hash,
        "best": list(state.best) if state.best else None,
        "versions": state.versions,
        "loss_scaler": state.extras[0].get("loss_scaler"),
        "spec": state.spec,
        "tensors": {name: list(shape) for name, shape in shapes.items()},
    }


def clear(path: Path, keep: int, aside: bool) -> Iterator[Path]:
    """Delete all but the newest `keep` and the best of a run that is not being written; yields what went.

    With `aside`, those that are kept aside too. Raises RequestError when the run is at work, RunFailed when
    something cannot be deleted.
    """
    directory = RunDirectory.open(checkpoints_folder(path).parent)
    with directory.lock():
        try:
            yield from _cleared(directory, keep, aside)
        except OSError as error:
            raise RunFailed(f"cannot delete from {directory.checkpoints}: {error}") from error


def _cleared(directory: RunDirectory, keep: int, aside: bool) -> Iterator[Path]:
    yield from (one.path for one in prune(directory.checkpoints, keep, _best_step(directory)))
    others = [other for pattern in ASIDE for other in directory.checkpoints.glob(pattern)]
    for folder in sorted(others) if aside else []:
        for checkpoint in complete_checkpoints(folder):
            yield checkpoint.path
        shutil.rmtree(folder)


def _best_step(directory: RunDirectory) -> int | None:
    """As the newest that can be read has it."""
    for checkpoint in reversed(complete_checkpoints(directory.checkpoints)):
        try:
            best = checkpoint.state().best
        except CheckpointError:
            continue
        return best[0] if best else None
    return None
