"""One checkpoint on disk, format version 1.

    checkpoints/step-00000200/
        weights.safetensors    fp32 weights by parameter name, buffers in their own dtype
        moments.safetensors    fp32 moments as <kind>/<parameter name>
        state.json             step, guards, each rank's extras, data hash, spec, versions

A folder is written under a temporary name and renamed when it is whole, so a folder with its real name is
complete. Nothing in it is a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from xtrain.contract import StateKind
from xtrain.errors import RequestError
from xtrain.rundir import write_json

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
WEIGHTS, MOMENTS, STATE = "weights.safetensors", "moments.safetensors", "state.json"
LARGEST_STATE_BYTES = 64 << 20
_NAME = re.compile(r"step-(\d{8,12})")


class CheckpointError(RequestError):
    """A checkpoint that is missing, damaged, or not of this run."""


class State(BaseModel):
    """state.json: all that is not a tensor."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    format_version: int = FORMAT_VERSION
    step: int = Field(ge=0)
    """Updates done; the next one has this 0-based index."""
    backend: str
    world: int = Field(ge=1)
    guards: dict[str, JsonValue] | None
    extras: list[dict[str, JsonValue]]
    """Engine.extras of each rank."""
    data_hash: str
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
            state = State.model_validate_json(file.read_bytes())
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"{file} is damaged: {where}: {first['msg']}") from None
        if state.format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format version {state.format_version}; this xtrain reads {FORMAT_VERSION}"
            )
        if state.step != self.step:
            raise CheckpointError(f"{file} says step {state.step}, its folder step {self.step}")
        return state

    def reader(self) -> Reader:
        return Reader(self.path)


class Reader:
    """The contract's StateReader over a checkpoint's files; a tensor is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._files: dict[str, Any] = {}
        for name in (WEIGHTS, MOMENTS):
            try:
                self._files[name] = safe_open(path / name, framework="pt", device="cpu")
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path / name} is damaged or missing: {error}") from error
        self._keys = {name: set(file.keys()) for name, file in self._files.items()}

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        file, key = _place(name, kind)
        return self._files[file].get_tensor(key) if key in self._keys[file] else None


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every complete checkpoint below `folder`, by step number, oldest first."""
    if not folder.is_dir():
        return []
    found = ((path, _NAME.fullmatch(path.name)) for path in folder.iterdir() if path.is_dir())
    return sorted((Checkpoint(p, int(m[1])) for p, m in found if m), key=lambda c: c.step)


def write(folder: Path, state: State, tensors: Mapping[tuple[str, StateKind], torch.Tensor]) -> Checkpoint:
    """Write one checkpoint below `folder`: whole, or not at all.

    A complete one of the same step is replaced. Leftovers of writers that died are removed.
    """
    from safetensors.torch import save_file

    final = folder / folder_name(state.step)
    partial = folder / f".{final.name}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        for file in (WEIGHTS, MOMENTS):
            inside = {key: t for (n, k), t in tensors.items() for f, key in [_place(n, k)] if f == file}
            save_file(inside, partial / file)
            _sync(partial / file)
        write_json(partial / STATE, json.loads(state.model_dump_json()))
        _sync(partial)
        if final.exists():
            final.rename(folder / f".replaced.{os.getpid()}")
        partial.rename(final)
        _sync(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder / f".replaced.{os.getpid()}", ignore_errors=True)
    return Checkpoint(final, state.step)


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
