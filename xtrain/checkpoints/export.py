"""A checkpoint for other programs: weights in one file, a folder for Hugging Face, or a library's own form.

Tensors pass one at a time. The folder gets its name only when all is written and, for Hugging Face, when the
library's model was loaded from it and computes what ours does.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import ValidationError

from xtrain.checkpoints.format import MODEL_INDEX, STATE, Checkpoint, Damaged, Reader
from xtrain.checkpoints.shares import plan_files
from xtrain.checkpoints.tensorfile import TensorFile
from xtrain.checkpoints.writer import form_of, index_bytes, write_pieces
from xtrain.contract import StateForm, StateKey, StatePiece
from xtrain.errors import RequestError, RunFailed
from xtrain.models.hf_folder import CONFIG
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    import torch

    from xtrain.models.library import LibraryForm

Form: TypeAlias = Literal["safetensors", "hf", "ds-universal"]
Dtype: TypeAlias = Literal["fp32", "bf16", "fp16"]
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
WEIGHTS_FILE = "model.safetensors"
SHARD_BYTES = 8 << 30
"""Of fp32 weights in one file for Hugging Face: 4 GiB with 16 bits."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far the written model is from ours."""

    path: Path
    bytes: int
    difference: float | None = None
    """Largest of a logit, relative to the largest logit; None where there was nothing to compare."""
    notes: Sequence[str] = ()
    """What the form cannot carry."""


def export(
    checkpoint: Checkpoint, form: Form, dtype: Dtype, out: Path, shard_bytes: int = SHARD_BYTES
) -> Exported:
    """Write a checkpoint, every byte of which was checked, into the new folder `out`.

    For Hugging Face, a file has at most `shard_bytes` of weights, counted as fp32, or one parameter.

    Raises RequestError when `out` holds anything or the model is not one of Hugging Face's, RunFailed when it
    cannot be written or the written model computes something else.
    """
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"{out} is there already; choose another --out")
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        told = _WRITERS[form](checkpoint, partial, dtype, shard_bytes)
        size = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise RunFailed(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(told, path=out, bytes=size)


Convert: TypeAlias = "Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]"
"""Our name and tensor to those of the other program."""


def _write(
    reader: Reader, names: Collection[str], folder: Path, dtype: Dtype, convert: Convert, shard_bytes: int
) -> None:
    """One file of weights, or several and their index."""
    import torch

    wanted = getattr(torch, TORCH_NAMES[dtype])

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in sorted(names):
            tensor = reader.read(name, "buffer")  # a weight too: of any dtype
            assert tensor is not None
            yield convert(name, rounded(name, tensor) if tensor.dtype == torch.float32 else tensor)

    def rounded(name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.to(wanted)
        if not torch.equal(torch.isfinite(found), torch.isfinite(tensor)):
            raise RunFailed(f"{name} has values beyond what {dtype} holds; choose --dtype bf16 or fp32")
        return found

    # Twice through the files, once for what stands where: nothing is kept.
    forms: dict[StateKey, StateForm] = {(name, "weight"): form_of(tensor) for name, tensor in tensors()}
    plan = plan_files(forms, 1, shard_bytes)
    write_pieces(folder, plan, (StatePiece(name, "weight", tensor) for name, tensor in tensors()))
    for file in plan.files:
        with TensorFile(folder / file.name, file.layout) as opened:
            opened.write_header()
    if len(plan.files) > 1:
        (folder / MODEL_INDEX).write_bytes(index_bytes(plan.files))
    else:
        (folder / plan.files[0].name).rename(folder / WEIGHTS_FILE)


def _write_merged(checkpoint: Checkpoint, folder: Path, dtype: Dtype, shard_bytes: int) -> Exported:
    reader = checkpoint.reader()
    _write(reader, reader.keys("weight"), folder, dtype, lambda name, tensor: (name, tensor), sys.maxsize)
    return Exported(folder, 0)


def _write_library_form(checkpoint: Checkpoint, folder: Path, dtype: Dtype, shard_bytes: int) -> Exported:
    """Config and weights; RunFailed when the library's model is too far from ours."""
    from xtrain.models.library import TOLERANCE, library_form

    spec = _spec_of(checkpoint)
    own_config = checkpoint.path if CONFIG in checkpoint.manifest.files else None
    reader = checkpoint.reader()
    form: LibraryForm = library_form(spec, _vocabulary(reader), own_config, reader)
    form.write_config(folder, TORCH_NAMES[dtype])
    _write(reader, form.kept(reader.keys("weight")), folder, dtype, form.convert, shard_bytes)
    difference = form.difference(reader, folder, TORCH_NAMES[dtype])
    if not difference <= TOLERANCE:  # NaN too
        raise RunFailed(
            f"the exported model does not compute what ours does: its logits differ by {difference:.1e}, "
            f"expected at most {TOLERANCE:.0e}; nothing was written. This is a fault: please report it"
        )
    return Exported(folder, 0, difference, notes=list(form.write_companions(folder)))


def _spec_of(checkpoint: Checkpoint) -> Spec:
    """As the checkpoint tells it, which is no reason to run what it names."""
    try:
        spec = Spec.model_validate(checkpoint.state().spec)
    except ValidationError as error:
        raise Damaged(f"{checkpoint.path / STATE} is damaged: its spec: {error.errors()[0]['msg']}") from None
    if spec.model.trust_remote_code:
        raise RequestError(
            f"{checkpoint.path} is of a model with code of its own (model.trust_remote_code), which is not "
            "run for an export; expected a model of the transformers library. Its weights: --to safetensors"
        )
    return spec


def _write_universal(checkpoint: Checkpoint, folder: Path, dtype: Dtype, shard_bytes: int) -> Exported:
    """Moments too, so it is a training state, in fp32."""
    from xtrain.checkpoints.foreign import keeper_of

    if dtype != "fp32":
        raise RequestError(f"--dtype {dtype}: a universal checkpoint has fp32 weights; leave --dtype out")
    form = "ds-universal"
    return Exported(folder, 0, notes=keeper_of(form, writes=True).write_state(checkpoint, form, folder))


_WRITERS: dict[Form, Callable[[Checkpoint, Path, Dtype, int], Exported]] = {
    "safetensors": _write_merged,
    "hf": _write_library_form,
    "ds-universal": _write_universal,
}


def _vocabulary(reader: Reader) -> int:
    """Rows of a preset's token embedding; other models know their own."""
    shape = reader.shape("stem.token_embedding.weight", "weight")
    return shape[0] if shape else 1
