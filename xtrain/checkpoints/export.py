"""A checkpoint's weights for other programs: one safetensors file, or a folder that Hugging Face loads.

Tensors pass one at a time. The folder gets its name only when all is written and, for Hugging Face, when the
library's model was loaded from it and computes what ours does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from xtrain.checkpoints.format import Checkpoint, Reader
from xtrain.checkpoints.tensorfile import FileLayout, TensorFile
from xtrain.checkpoints.writer import form_of
from xtrain.errors import RequestError, RunFailed
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    import torch

    from xtrain.models.library import LibraryForm

Dtype: TypeAlias = Literal["fp32", "bf16", "fp16"]
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WEIGHTS_FILE = "model.safetensors"


@dataclass(frozen=True)
class Exported:
    """What was written, and how far the written model is from ours."""

    path: Path
    bytes: int
    difference: float | None
    """Largest, relative to the largest value; None where there was nothing to compare."""


def export(checkpoint: Checkpoint, form: Literal["safetensors", "hf"], dtype: Dtype, out: Path) -> Exported:
    """Write the weights of a checkpoint, every byte of which was checked, into the new folder `out`.

    Raises RequestError when `out` holds anything or the model is not one of Hugging Face's, RunFailed when it
    cannot be written or the written model computes something else.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is there already; choose another --out")
    spec = Spec.model_validate(checkpoint.state().spec)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    difference = None
    try:
        partial.mkdir(parents=True)
        if form == "safetensors":
            _write(checkpoint.reader(), partial / WEIGHTS_FILE, dtype, lambda name, tensor: (name, tensor))
        else:
            difference = _write_library_form(checkpoint, spec, partial, dtype)
        size = sum(file.stat().st_size for file in partial.iterdir())
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise RunFailed(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, size, difference)


Convert: TypeAlias = "Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]"
"""Our name and tensor to those of the other program."""


def _write(reader: Reader, file: Path, dtype: Dtype, convert: Convert) -> None:
    import torch

    wanted = getattr(torch, TORCH_NAMES[dtype])

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(reader.keys("weight")):
            tensor = reader.read(name, "buffer")  # a weight too: of any dtype
            assert tensor is not None
            yield convert(name, tensor.to(wanted) if tensor.dtype == torch.float32 else tensor)

    # Twice through the files, once for what stands where: nothing is kept.
    layout = FileLayout.of({name: form_of(tensor) for name, tensor in tensors()})
    with TensorFile(file, layout) as opened:
        for name, tensor in tensors():
            opened.write(name, tensor)
        opened.write_header()


def _write_library_form(checkpoint: Checkpoint, spec: Spec, folder: Path, dtype: Dtype) -> float:
    """Config and weights; returns how far the library's model is from ours, RunFailed when it is too far."""
    from xtrain.models.library import TOLERANCE, library_form

    vocabulary = _vocabulary(checkpoint.reader())
    form: LibraryForm = library_form(spec, vocabulary)
    form.write_config(folder, TORCH_NAMES[dtype])
    _write(checkpoint.reader(), folder / WEIGHTS_FILE, dtype, form.convert)
    difference = form.difference(checkpoint.reader(), folder, TORCH_NAMES[dtype])
    if difference > TOLERANCE:
        raise RunFailed(
            f"the exported model does not compute what ours does: its outputs differ by {difference:.1e}, "
            f"expected at most {TOLERANCE:.0e}; nothing was written. This is a fault: please report it"
        )
    return difference


def _vocabulary(reader: Reader) -> int:
    """Rows of a preset's token embedding; other models know their own."""
    shape = reader.shape("stem.token_embedding.weight", "weight")
    return shape[0] if shape else 1
