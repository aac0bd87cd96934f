"""One checkpoint on its way to the disk: whole, or not at all.

Rank 0 makes a folder with a temporary name (`begin`); every rank writes its share of the tensors into it
(`write_share`); when all have, rank 0 adds the rest, the manifest last, and renames the folder (`commit`).
Until then nothing that was there before is touched. All of them raise OSError.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from xtrain.checkpoints.format import (
    FORMAT_VERSION,
    MANIFEST,
    MODEL_INDEX,
    OPTIMIZER_INDEX,
    STATE,
    Checkpoint,
    State,
    folder_name,
    key_of,
    manifest_bytes,
    sha256,
)
from xtrain.checkpoints.shares import Shard, share_out
from xtrain.checkpoints.tensorfile import Shape, TensorFile
from xtrain.contract import JSON, StateKind, StateTensor

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "Mapping[tuple[str, StateKind], torch.Tensor]"
"""By name and kind."""
Family: TypeAlias = Literal["model", "optimizer"]

MOMENTS: tuple[StateKind, ...] = ("exp_avg", "exp_avg_sq", "momentum")
_INDEXES: dict[Family, str] = {"model": MODEL_INDEX, "optimizer": OPTIMIZER_INDEX}


@dataclass
class Share:
    """What one rank wrote; becomes part of the indexes and of the manifest."""

    places: dict[Family, dict[str, str]] = field(default_factory=lambda: {"model": {}, "optimizer": {}})
    """File name by key."""
    tensor_bytes: dict[Family, int] = field(default_factory=lambda: {"model": 0, "optimizer": 0})
    files: dict[str, dict[str, int | str]] = field(default_factory=dict)
    """Size and hash by file name."""

    def add(self, tensor: StateTensor, file: TensorFile) -> None:
        assert tensor.value is not None
        key, family = key_of(tensor.name, tensor.kind), family_of(tensor.kind)
        file.add(key, tensor.value)
        self.places[family][key] = file.path.name
        self.tensor_bytes[family] += tensor.value.numel() * tensor.value.element_size()

    def finish(self, file: TensorFile) -> None:
        file.finish()
        self.files[file.path.name] = synced(file.path)


def family_of(kind: StateKind) -> Family:
    return "optimizer" if kind in MOMENTS else "model"


def begin(folder: Path, step: int) -> Path:
    """A new folder to write into, below `folder`. Leftovers of writers that died are removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = folder / f".{folder_name(step)}.{os.getpid()}"
    partial.mkdir()
    return partial


def write_share(partial: Path, shards: Sequence[Shard], tensors: Iterable[StateTensor]) -> Share:
    """Write one rank's tensors as they come, into the files of its shards.

    Tensors that are not fp32 (buffers) are held until the end and get a file of their own: beside others they
    would be misaligned. ValueError names one that no checkpoint can hold.
    """
    share, held = Share(), []
    shard_of = {name: shard for shard in shards for name in shard.shapes}
    with ExitStack() as stack:
        files: dict[str, TensorFile] = {}
        for tensor in tensors:
            if tensor.value is None:
                continue
            if str(tensor.value.dtype) != "torch.float32":
                held.append(tensor)
                continue
            shard, family = shard_of[tensor.name], family_of(tensor.kind)
            name = f"{family}-{shard.label}.safetensors"
            if name not in files:
                files[name] = stack.enter_context(TensorFile(partial / name, _room(shard, family)))
            share.add(tensor, files[name])
        for file in files.values():
            share.finish(file)
    if held:
        _write_held(partial / f"buffers-{shards[0].label}.safetensors", held, share)
    return share


def _write_held(path: Path, held: list[StateTensor], share: Share) -> None:
    held.sort(key=lambda tensor: -tensor.value.element_size() if tensor.value is not None else 0)
    room = {tensor.name: tuple(tensor.value.shape) for tensor in held if tensor.value is not None}
    with TensorFile(path, room) as file:
        for tensor in held:
            share.add(tensor, file)
        share.finish(file)


def _room(shard: Shard, family: Family) -> Mapping[str, Shape]:
    """Every key that one of its files may get."""
    if family == "model":
        return shard.shapes
    return {key_of(name, kind): shape for name, shape in shard.shapes.items() for kind in MOMENTS}


def commit(partial: Path, state: State, shares: Sequence[Share]) -> Checkpoint:
    """Make a checkpoint of what the ranks wrote. A complete one of the same step is replaced."""
    final = partial.with_name(folder_name(state.step))
    replaced = partial.with_name(f".{final.name}.replaced")
    files = {name: facts for share in shares for name, facts in share.files.items()}
    for family, name in _INDEXES.items():
        places = {key: place for share in shares for key, place in share.places[family].items()}
        total = sum(share.tensor_bytes[family] for share in shares)
        index: JSON = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        files[name] = _write(partial / name, json.dumps(index, indent=2).encode())
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


def discard(partial: Path) -> None:
    """Remove what was written so far, as far as that is possible."""
    shutil.rmtree(partial, ignore_errors=True)


def write(folder: Path, state: State, tensors: Tensors) -> Checkpoint:
    """Write one checkpoint below `folder` from tensors that this process has."""
    partial = begin(folder, state.step)
    shapes = {name: tuple(tensor.shape) for (name, kind), tensor in tensors.items()}
    each = (StateTensor(name, kind, tensor) for (name, kind), tensor in tensors.items())
    try:
        return commit(partial, state, [write_share(partial, share_out(shapes, 1), each)])
    finally:
        discard(partial)


def synced(file: Path) -> dict[str, int | str]:
    """Its size and hash, read back, once its content is on the disk."""
    sync(file)
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}


def sync(path: Path) -> None:
    """Return once a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: Path, content: bytes) -> dict[str, int | str]:
    file.write_bytes(content)
    return synced(file)
