"""`model.init_from`: weights to start from, by parameter name; all else of a run begins anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtrain.checkpoints.format import CheckpointError
from xtrain.checkpoints.select import select
from xtrain.errors import RequestError
from xtrain.models.hf_folder import CONFIG

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xtrain.models.source import NotedSource

ADAPTED = "model."
"""What a parameter's name begins with here where the model is not ours (xtrain/models/adapter.py)."""
SHOWN = 3


class StoredStart:
    """The model of another source, its weights replaced by stored ones.

    RequestError names parameters that are not stored, or stored in another shape.
    """

    def __init__(self, source: NotedSource, path: str) -> None:
        self.source = source
        self.folder = Path(path).expanduser()
        self.description = f"{source.description}, from {path}"

    @property
    def shape(self) -> tuple[int, int] | None:
        return self.source.shape

    @property
    def notes(self) -> Sequence[str]:
        return self.source.notes

    def build(self) -> nn.Module:
        import torch

        model = self.source.build()
        read = _of_library(self.folder) if (self.folder / CONFIG).is_file() else _of_run(self.folder)
        wrong = []
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                stored = read(name)
                if stored is None:
                    wrong.append(f"no {name}")
                elif stored.shape != parameter.shape:
                    wrong.append(f"{name} {tuple(stored.shape)}, expected {tuple(parameter.shape)}")
                else:
                    parameter.copy_(stored)
        if wrong:
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise RequestError(
                f"model.init_from: found {self.folder} with {'; '.join(wrong[:SHOWN])}{more}; expected "
                "weights for every parameter: name a checkpoint of this kind and size of model"
            )
        return model

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return self.source.decayed(name, parameter)


Read = Callable[[str], "torch.Tensor | None"]
"""The stored weight of a parameter; None where there is none."""


def _of_run(path: Path) -> Read:
    """A run directory's newest valid checkpoint, or the checkpoint that `path` is; every byte is checked."""
    try:
        found = select(path, hashes=True).checkpoint
    except CheckpointError as error:
        raise RequestError(f"model.init_from: {str(error).removeprefix('--resume ')}") from error
    if found is None:
        raise RequestError(
            f"model.init_from: found {path}, expected a run directory with a checkpoint in it, a checkpoint, "
            f"or a folder with {CONFIG} and safetensors"
        )
    reader = found.reader()
    return lambda name: reader.read(name, "weight")


def _of_library(folder: Path) -> Read:
    """A folder of Hugging Face's form."""
    files = _open_all(folder)
    return lambda name: next(
        (files[key].get_tensor(key) for key in (name, name.removeprefix(ADAPTED)) if key in files), None
    )


def _open_all(folder: Path) -> Mapping[str, Any]:
    """The open safetensors file of each key in it."""
    from safetensors import SafetensorError, safe_open

    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise RequestError(f"model.init_from: {path} cannot be read: {error}") from error
        files |= dict.fromkeys(file.keys(), file)
    if not files:
        raise RequestError(
            f"model.init_from: found {folder}, expected safetensors in it: only those are read"
        )
    return files
