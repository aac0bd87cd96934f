"""`model.init_from`: weights to start from, by parameter name; all else of a run begins anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from xtrain.checkpoints.format import ADAPTED, MANIFEST, STATE, CheckpointError, Reader
from xtrain.checkpoints.select import select
from xtrain.checkpoints.tensorfile import Shape
from xtrain.contract import GradualSource
from xtrain.errors import RequestError
from xtrain.models.gpt2_folder import OfGPT2, is_gpt2
from xtrain.models.hf_folder import CONFIG
from xtrain.models.hf_weights import open_weights

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xtrain.models.source import NotedSource, PresetSource

SHOWN = 3
FLOATS = ("F64", "F32", "F16", "BF16")
"""safetensors' names of what becomes a weight."""


class StoredStart:
    """The model of another source, its weights replaced by stored ones.

    RequestError names parameters that are not stored, or stored in another shape.
    """

    def __init__(self, source: NotedSource, path: str) -> None:
        self.source = source
        self.folder = Path(path).expanduser()
        self.description = f"{source.description}, from {path}"
        self._passed_over: Sequence[str] = ()

    @property
    def shape(self) -> tuple[int, int] | None:
        return self.source.shape

    @property
    def content_hash(self) -> str | None:
        return self.source.content_hash

    @property
    def notes(self) -> Sequence[str]:
        return (*self.source.notes, *self._passed_over)

    @property
    def files(self) -> Mapping[str, bytes]:
        return self.source.files

    @property
    def outline(self) -> nn.Module | str | None:
        return self.source.outline

    def build(self) -> nn.Module:
        return self._loaded(self.source.build())

    def build_gradually(self) -> nn.Module:
        if isinstance(self.source, GradualSource):
            return self._loaded(self.source.build_gradually())
        return self.build()

    def _loaded(self, model: nn.Module) -> nn.Module:
        stored = self._stored()
        self._require(model, stored)
        _load(model, stored)
        return model

    def _stored(self) -> Stored:
        return self._of_library() if _is_library(self.folder) else self._of_run()

    def _of_library(self) -> Stored:
        return OfLibrary(_files(self.folder))

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return self.source.decayed(name, parameter)

    def _of_run(self) -> Stored:
        """A run directory's newest valid checkpoint, or the checkpoint that it is; every byte is checked."""
        try:
            selected = select(self.folder, hashes=True)
        except CheckpointError as error:
            raise RequestError(f"model.init_from: {str(error).removeprefix('--resume ')}") from error
        if selected.checkpoint is None:
            raise RequestError(
                f"model.init_from: found {self.folder}, expected a run directory with a checkpoint in it, a "
                f"checkpoint, or a folder with {CONFIG} and safetensors"
            )
        self._passed_over = [f"model.init_from: passed over: {reason}" for _, reason in selected.damaged]
        return OfCheckpoint(selected.checkpoint.reader())

    def _require(self, model: nn.Module, stored: Stored) -> None:
        """Raise RequestError unless all fits, by the files' headers: no tensor is read for it."""
        wrong = list(misfits(model, stored))
        if wrong:
            more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise RequestError(
                f"model.init_from: found {self.folder} with {'; '.join(wrong[:SHOWN])}{more}; expected "
                "weights for every parameter: name a checkpoint of this kind and size of model"
            )


class PiecewiseStart(StoredStart):
    """Of a preset: what does not fit is told before the model takes its memory, piece by piece."""

    def __init__(self, source: PresetSource, path: str) -> None:
        super().__init__(source, path)
        self._preset = source
        self._found: Stored | None = None

    def build(self) -> nn.Module:
        self.skeleton()
        return super().build()

    def skeleton(self) -> nn.Module:
        model = self._preset.skeleton()
        self._require(model, self._stored())
        return model

    def weight(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return self._stored().read(name).float()

    def _stored(self) -> Stored:
        self._found = self._found or super()._stored()
        return self._found

    def _of_library(self) -> Stored:
        """A preset is GPT-2, so its names may be the library's for that."""
        files = _files(self.folder)
        return OfGPT2(self.folder, files, self._preset.size) if is_gpt2(files) else OfLibrary(files)


class Stored(Protocol):
    """Stored weights and buffers, by the names of our model."""

    def form(self, name: str) -> tuple[str, Shape] | None:
        """Dtype, as safetensors names it, and shape; None where there is no such tensor."""
        ...

    def read(self, name: str) -> torch.Tensor: ...


class OfCheckpoint:
    """Those of a checkpoint of ours."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    def form(self, name: str) -> tuple[str, Shape] | None:
        shape = self._reader.shape(name, "weight")
        return None if shape is None else (self._reader.dtype(name, "weight"), shape)

    def read(self, name: str) -> torch.Tensor:
        found = self._reader.read(name, "buffer")  # a weight too: of any dtype
        assert found is not None
        return found


def _is_library(folder: Path) -> bool:
    """Whether it is a folder of Hugging Face's form, and no checkpoint, which may have a config too."""
    own = (folder / MANIFEST, folder / STATE)  # one that lost its manifest is damaged, not the library's
    return (folder / CONFIG).is_file() and not any(file.is_file() for file in own)


class OfLibrary:
    """Those of a folder of Hugging Face's form: the open safetensors file of each key in it."""

    def __init__(self, files: Mapping[str, Any]) -> None:
        self._files = files

    def form(self, name: str) -> tuple[str, Shape] | None:
        key = self._key(name)
        if key is None:
            return None
        found = self._files[key].get_slice(key)
        return str(found.get_dtype()), tuple(found.get_shape())

    def read(self, name: str) -> torch.Tensor:
        key = self._key(name)
        assert key is not None
        found: torch.Tensor = self._files[key].get_tensor(key)
        return found

    def _key(self, name: str) -> str | None:
        return next((key for key in (name, name.removeprefix(ADAPTED)) if key in self._files), None)


def misfits(model: nn.Module, stored: Stored) -> Iterator[str]:
    """What is not there, or is another thing than the model has: a few words each."""
    parameters = dict(model.named_parameters())
    for name, tensor in (parameters | _kept_buffers(model)).items():
        found = stored.form(name)
        if found is None:
            if name in parameters:
                yield f"no {name}"
            continue
        dtype, shape = found
        if shape != tuple(tensor.shape):
            yield f"{name} {shape}, expected {tuple(tensor.shape)}"
        elif (dtype in FLOATS) != tensor.is_floating_point():
            yield f"{name} of dtype {dtype}, expected {str(tensor.dtype).removeprefix('torch.')}"


def _load(model: nn.Module, stored: Stored) -> None:
    import torch

    with torch.no_grad():
        for name, tensor in (dict(model.named_parameters()) | _kept_buffers(model)).items():
            if stored.form(name) is not None:
                tensor.copy_(stored.read(name))


def _kept_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that a state dict has. The others follow from the model's config, which may be another one."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def _files(folder: Path) -> Mapping[str, Any]:
    """The open safetensors file of each tensor there."""
    files = open_weights(folder, "model.init_from", otherwise="*.safetensors")
    if not files:
        raise RequestError(
            f"model.init_from: found {folder}, expected safetensors in it: only those are read"
        )
    return files
