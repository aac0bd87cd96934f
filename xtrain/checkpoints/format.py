"""One checkpoint on disk, format version 1.

    checkpoints/step-00000200/
        weights.safetensors    fp32 weights by parameter name, buffers in their own dtype
        moments.safetensors    fp32 moments as <kind>/<parameter name>
        state.json             step, guards, each rank's extras, data hash, spec, versions

A folder is written under a temporary name and renamed when it is whole, so a folder with its real name is
complete. Nothing in it is a pickle.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from xtrain.contract import StateKind
from xtrain.errors import RequestError
from xtrain.rundir import write_json

if TYPE_CHECKING:
    import torch

Tensors: TypeAlias = "Mapping[tuple[str, StateKind], torch.Tensor]"
"""By name and kind."""

FORMAT_VERSION = 1
WEIGHTS, MOMENTS, STATE = "weights.safetensors", "moments.safetensors", "state.json"
LARGEST_STATE_BYTES = 64 << 20
_NAME = re.compile(r"step-(\d{8,12})")


class CheckpointError(RequestError):
    """A checkpoint that is missing, damaged, or not of this run."""


class Versioned(BaseModel):
    """What every version of state.json has, looked at before the rest."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION


class State(Versioned):
    """state.json: all that is not a tensor."""

    step: int = Field(ge=0)
    """Updates done; the next one has this 0-based index."""
    backend: str
    world: int = Field(ge=1)
    guards: dict[str, JsonValue] | None
    extras: list[dict[str, JsonValue]] = Field(min_length=1)
    """Engine.extras of each rank."""
    data_hash: str
    best: tuple[int, float] | None = None
    """Step and eval_loss of the best checkpoint so far, where checkpoint.best asked for it."""
    spec: dict[str, JsonValue]
    versions: dict[str, JsonValue]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder."""

    path: Path
    step: int

    def state(self) -> State:
        """The checked state.json; CheckpointError says what is wrong with it."""
        file = self.path / STATE
        try:
            if file.stat().st_size > LARGEST_STATE_BYTES:
                raise CheckpointError(f"{file} is too large: more than {LARGEST_STATE_BYTES} bytes")
            data = file.read_bytes()
            version = Versioned.model_validate_json(data).format_version
            if version != FORMAT_VERSION:
                raise CheckpointError(
                    f"{file} has format version {version}; this xtrain reads {FORMAT_VERSION}"
                )
            state = State.model_validate_json(data)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise CheckpointError(f"{file} is damaged: {where}{first['msg']}") from None
        if state.step != self.step:
            raise CheckpointError(f"{file} says step {state.step}, its folder step {self.step}")
        return state

    def check_files(self) -> None:
        """Raise CheckpointError unless both tensor files are there, whole and well-formed; needs no torch."""
        for name in (WEIGHTS, MOMENTS):
            _open(self.path / name, "np")

    def reader(self) -> Reader:
        return Reader(self.path)


class Reader:
    """The contract's StateReader over a checkpoint's files; files and tensors are read when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._files: dict[str, tuple[Any, set[str]]] = {}
        """Each file with its keys, once it is open."""

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        place, key = _place(name, kind)
        if place not in self._files:
            opened = _open(self._path / place, "pt")
            self._files[place] = opened, set(opened.keys())
        file, keys = self._files[place]
        return file.get_tensor(key) if key in keys else None


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every complete checkpoint below `folder`, by step number, oldest first."""
    if not folder.is_dir():
        return []
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir())
    return sorted((Checkpoint(p, int(m[1])) for p, m in found if m), key=lambda c: c.step)


def write(folder: Path, state: State, tensors: Tensors) -> Checkpoint:
    """Write one checkpoint below `folder`: whole, or not at all.

    A complete one of the same step is replaced. Leftovers of writers that died are removed. Raises OSError.
    """
    final = folder / folder_name(state.step)
    partial = folder / f".{final.name}.{os.getpid()}"
    replaced = folder / f".{final.name}.replaced"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        for file in (WEIGHTS, MOMENTS):
            inside = {key: t for (n, k), t in tensors.items() for f, key in [_place(n, k)] if f == file}
            _save(inside, partial / file)
            _sync(partial / file)
        write_json(partial / STATE, json.loads(state.model_dump_json()))
        _sync(partial)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return Checkpoint(final, state.step)


def _open(file: Path, framework: str) -> Any:
    """The file, its header read and held against its size."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework=framework)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged or missing: {error}") from error


def _save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """safetensors takes neither strided tensors nor two in one storage: those are copied."""
    from safetensors import SafetensorError, serialize_file

    try:
        if not tensors:
            serialize_file({}, file)  # without importing torch
            return
        from safetensors.torch import save_file

        seen: set[int] = set()
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage().data_ptr()
            tensors[name] = tensor.clone() if storage in seen else tensor.contiguous()
            seen.add(storage)
        save_file(tensors, file)
    except SafetensorError as error:  # such as a full disk
        raise OSError(errno.EIO, str(error)) from error


def _place(name: str, kind: StateKind) -> tuple[str, str]:
    """(file, key) of a tensor."""
    return (WEIGHTS, name) if kind in ("weight", "buffer") else (MOMENTS, f"{kind}/{name}")


def _sync(path: Path) -> None:
    """Return once a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
