"""The weights in a folder of Hugging Face's form, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from xtrain.checkpoints.format import MODEL_INDEX, Index
from xtrain.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor, nn

WHOLE = "model.safetensors"
PARTS = "model-*.safetensors"


def open_weights(folder: Path, key: str, otherwise: str = PARTS) -> Mapping[str, Any]:
    """The open safetensors file of each tensor in `folder`; RequestError, of the spec's `key`.

    As the library chooses: the one whole file, or what an index names. Without either, all `otherwise`.
    """
    if (folder / WHOLE).is_file():
        return _opened([folder / WHOLE], key)
    if (folder / MODEL_INDEX).is_file():
        return _indexed(folder / MODEL_INDEX, key)
    return _opened(sorted(folder.glob(otherwise)), key)


def _indexed(index: Path, key: str) -> Mapping[str, Any]:
    """What the index names and nothing else: files of an earlier save may lie beside them."""
    try:
        places = Index.model_validate_json(index.read_bytes()).weight_map
    except (OSError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
        raise RequestError(f"{key}: {index} cannot be read: {reason}") from error
    parts = {name: _opened([index.parent / name], key) for name in sorted(set(places.values()))}
    for tensor, name in places.items():
        if tensor not in parts[name]:
            raise RequestError(
                f"{key}: {index} says that {tensor} is in {name}, which has no such tensor; "
                "expected files and index of one save: write them again"
            )
    return {tensor: parts[name][tensor] for tensor, name in places.items()}


def _opened(paths: Iterable[Path], key: str) -> Mapping[str, Any]:
    from safetensors import SafetensorError, safe_open

    files: dict[str, Any] = {}
    for path in paths:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise RequestError(f"{key}: {path}: found a folder, a pipe or a device, expected a file")
        try:
            file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{key}: {path} cannot be read: {error}") from error
        files |= dict.fromkeys(file.keys(), file)
    return files


def copy_weights(model: nn.Module, folder: Path) -> bool:
    """Copy what the library would load from `folder` into `model`, a tensor at a time.

    False, and nothing was copied, unless each parameter and buffer is stored once, under its own name and
    in its own shape: the library knows how to rename and to merge, this does not.
    """
    import torch

    files = open_weights(folder, "model.hf")
    named = [(tensor, [name for name in names if name in files]) for tensor, names in _tensors(model)]
    if any(len(stored) != 1 or not _fits(tensor, files, stored[0]) for tensor, stored in named):
        return False
    with torch.no_grad():
        for tensor, (name,) in named:
            tensor.copy_(files[name].get_tensor(name))
    return True


def _tensors(model: nn.Module) -> Iterable[tuple[Tensor, list[str]]]:
    """All that a checkpoint of `model` has, with its names: tied ones have several."""
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (tensor, []))[1].append(name)
    return found.values()


def _fits(tensor: Tensor, files: Mapping[str, Any], name: str) -> bool:
    stored: list[int] = files[name].get_slice(name).get_shape()
    return list(tensor.shape) == stored
