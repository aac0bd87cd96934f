"""One checkpoint on its way to the disk: whole, or not at all.

Rank 0 makes a folder with a temporary name (`begin`); every rank writes its pieces of the tensors into the
files there (`write_pieces`); when all have, each file is finished by the rank whose it is (`finish_files`);
then rank 0 adds the rest, the manifest last, and renames the folder (`commit`). Until then nothing that was
there before is touched. All of them raise OSError.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from xtrain.checkpoints.format import (
    FORMAT_VERSION,
    MANIFEST,
    MODEL_INDEX,
    OPTIMIZER_INDEX,
    STATE,
    Checkpoint,
    State,
    complete_checkpoints,
    folder_name,
    manifest_bytes,
    replaced_name,
    sha256,
    wrapper_of,
)
from xtrain.checkpoints.shares import Family, Plan, PlannedFile, plan_files
from xtrain.checkpoints.tensorfile import TensorFile
from xtrain.contract import JSON, StateForm, StateKey, StatePiece
from xtrain.durable import sync

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "Mapping[StateKey, torch.Tensor]"
Written: TypeAlias = Mapping[str, int]
"""Bytes by file name."""
FileFacts: TypeAlias = Mapping[str, Mapping[str, int | str]]
"""Size and hash by file name, for the manifest."""

_INDEXES: dict[Family, str] = {"model": MODEL_INDEX, "optimizer": OPTIMIZER_INDEX}


def begin(folder: Path, step: int) -> Path:
    """A new folder to write into, below `folder`. Leftovers of writers that died are removed.

    One may have died after it moved a checkpoint out of the way of a new one, before that had its name: then
    the old one gets its name back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for moved in complete_checkpoints(folder):
        if moved.path.name == replaced_name(moved.step):
            moved.path.rename(folder / folder_name(moved.step))
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = folder / f".{folder_name(step)}.{os.getpid()}"
    partial.mkdir()
    return partial


def write_pieces(partial: Path, plan: Plan, pieces: Iterable[StatePiece]) -> Written:
    """Write one rank's pieces as they come, each to its place, and bring them to the disk."""
    written: Counter[str] = Counter()
    with ExitStack() as stack:
        files: dict[str, TensorFile] = {}
        for piece in pieces:
            key = plan.key_of(piece.name, piece.kind)
            file = plan.file_of[key]
            if file.name not in files:
                files[file.name] = stack.enter_context(TensorFile(partial / file.name, file.layout))
            written[file.name] += files[file.name].write(key, piece.value, piece.begin)
    for name in written:
        sync(partial / name)
    return written


def finish_files(partial: Path, plan: Plan, rank: int, written: Sequence[Written]) -> FileFacts:
    """Give the files of `rank` their headers, now that every rank has written its pieces.

    ValueError names one that is not whole.
    """
    facts = {}
    for file in plan.files:
        if file.rank != rank:
            continue
        found, expected = sum(by_rank.get(file.name, 0) for by_rank in written), file.layout.data_bytes
        if found != expected:
            raise ValueError(f"{file.name}: {found} bytes of tensors came, expected {expected}")
        with TensorFile(partial / file.name, file.layout) as opened:
            opened.write_header()
        facts[file.name] = synced(partial / file.name)
    return facts


def commit(
    partial: Path,
    state: State,
    plan: Plan,
    finished: Sequence[FileFacts],
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> Checkpoint:
    """Make a checkpoint of what the ranks wrote, and `others`, files by name.

    A complete one of the same step is replaced.
    """
    final = partial.with_name(folder_name(state.step))
    replaced = partial.with_name(replaced_name(state.step))
    files: dict[str, JSON] = {name: facts for by_rank in finished for name, facts in by_rank.items()}
    for family, name in _INDEXES.items():
        own = [file for file in plan.files if file.family == family]
        files[name] = _write(partial / name, index_bytes(own))
    for name, content in others.items():
        files[name] = _write(partial / name, content)
    files[STATE] = _write(partial / STATE, state.model_dump_json(indent=2).encode())
    manifest: dict[str, JSON] = {"format_version": FORMAT_VERSION, "step": state.step, "files": files}
    _write(partial / MANIFEST, manifest_bytes(manifest))
    sync(partial)
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(final, state.step)


def index_bytes(files: Sequence[PlannedFile]) -> bytes:
    """Which file each tensor is in, as Hugging Face has it."""
    places = {key: file.name for file in files for key in file.layout.places}
    total = sum(file.layout.data_bytes for file in files)
    index: JSON = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2).encode()


def discard(partial: Path) -> None:
    """Remove what was written so far, as far as that is possible."""
    shutil.rmtree(partial, ignore_errors=True)


def write(folder: Path, state: State, tensors: Tensors) -> Checkpoint:
    """Write one checkpoint below `folder` from tensors that this process has."""
    layout = {key: form_of(tensor) for key, tensor in tensors.items()}
    pieces = (StatePiece(name, kind, tensor) for (name, kind), tensor in tensors.items())
    return write_streamed(folder, state, layout, pieces)


def write_streamed(
    folder: Path,
    state: State,
    layout: Mapping[StateKey, StateForm],
    pieces: Iterable[StatePiece],
    others: Mapping[str, bytes] = MappingProxyType({}),
) -> Checkpoint:
    """The same, from pieces as they come, with `others` as in `commit`."""
    partial = begin(folder, state.step)
    try:
        plan = plan_files(layout, 1, wrapper=wrapper_of(others))
        written = write_pieces(partial, plan, pieces)
        return commit(partial, state, plan, [finish_files(partial, plan, 0, [written])], others)
    finally:
        discard(partial)


def form_of(tensor: torch.Tensor) -> StateForm:
    return StateForm(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def synced(file: Path) -> dict[str, int | str]:
    """Its size and hash, read back, once its content is on the disk."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def _write(file: Path, content: bytes) -> dict[str, int | str]:
    file.write_bytes(content)
    return synced(file)
