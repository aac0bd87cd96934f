"""Which checkpoint a run goes on from, and what becomes of those that it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xtrain.checkpoints.format import (
    Checkpoint,
    CheckpointError,
    Damaged,
    complete_checkpoints,
    folder_name,
    is_checkpoint_name,
)
from xtrain.durable import sync


@dataclass(frozen=True)
class Selected:
    """What `--resume PATH` means."""

    checkpoint: Checkpoint | None
    """None when the run directory has none yet."""
    damaged: Sequence[tuple[Checkpoint, str]] = ()
    """Newer ones that were passed over, and what is wrong with each."""


def select(path: Path, hashes: bool) -> Selected:
    """The newest valid checkpoint of a run directory, or the one that PATH is.

    With `hashes` every byte of it is checked. Raises CheckpointError when nothing is at `path`, when the one
    that was named is damaged, or when all are: what to train again is for people to decide then.
    """
    require_folder(path)
    if path.name == "checkpoints":
        path = path.parent
    if is_checkpoint_name(path.name):
        return Selected(_named(path, hashes))
    damaged: list[tuple[Checkpoint, str]] = []
    for checkpoint in reversed(complete_checkpoints(path / "checkpoints")):
        try:
            checkpoint.check(hashes)
        except Damaged as error:
            damaged.append((checkpoint, str(error)))
        else:
            return Selected(checkpoint, damaged)
    if damaged:
        listed = "\n  ".join(reason for _, reason in damaged)
        raise CheckpointError(
            f"every checkpoint of {path} is damaged:\n  {listed}\n"
            f"  To train again from step 0, move {path / 'checkpoints'} away and resume"
        )
    return Selected(None)


def require_folder(path: Path) -> None:
    """Raise CheckpointError when there is nothing at `--resume PATH` that could be read."""
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise CheckpointError(f"--resume {path}: {found}; expected a run directory")


def _named(path: Path, hashes: bool) -> Checkpoint:
    """The checkpoint at `path`; damaged, it is an error: who names one wants that one."""
    all_there = complete_checkpoints(path.parent)
    found = [one for one in all_there if one.path.name == path.name]
    if not found:
        raise CheckpointError(f"--resume {path} is not a checkpoint")
    try:
        found[0].check(hashes)
    except Damaged as error:
        earlier = [one for one in all_there if one.step < found[0].step]
        elsewhere = "" if path.parent.name == "checkpoints" else " --out DIR"
        named = f"; the one before it: --resume {earlier[-1].path}{elsewhere}" if earlier else ""
        hint = named or "; there is none before it"
        raise Damaged(f"{error}{hint}") from error
    return found[0]


def set_aside_after(folder: Path, step: int) -> Path | None:
    """Move the checkpoints after `step` out of the way of a run that goes on from there.

    They are of a course that is no longer this run's: left in place they would be resumed from, and be kept
    instead of newer ones. Returns the folder they are in now, where there were any.
    """
    return set_aside([one for one in complete_checkpoints(folder) if one.step > step], "superseded")


def set_aside(checkpoints: Sequence[Checkpoint], why: str) -> Path | None:
    """Move checkpoints of one folder into `<why>-<n>` beside them; nothing is deleted.

    On return that is on the disk. Raises OSError.
    """
    if not checkpoints:
        return None
    number = 1
    while (aside := checkpoints[0].path.parent / f"{why}-{number}").exists():
        number += 1
    aside.mkdir()
    for checkpoint in checkpoints:
        checkpoint.path.rename(aside / folder_name(checkpoint.step))
    sync(aside)
    sync(aside.parent)
    return aside


def prune(folder: Path, keep: int, best_step: int | None) -> list[Checkpoint]:
    """Delete all but the newest `keep` and the best; returns those that went.

    One whose files are not even of the right size does not count as kept, and is left for people to look at.
    """
    sound = [one for one in complete_checkpoints(folder) if _looks_sound(one)]
    gone = [one for one in sound[:-keep] if one.step != best_step]
    for checkpoint in gone:
        remove(checkpoint)
    return gone


def remove(checkpoint: Checkpoint) -> None:
    """Delete a checkpoint; one that was deleted halfway no longer has a checkpoint's name."""
    import shutil

    doomed = checkpoint.path.with_name(f".{folder_name(checkpoint.step)}.removed")
    checkpoint.path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _looks_sound(checkpoint: Checkpoint) -> bool:
    try:
        return not list(checkpoint.damage(hashes=False))
    except CheckpointError:
        return False
