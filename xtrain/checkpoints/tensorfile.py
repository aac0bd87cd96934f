"""One safetensors file, written piece by piece, by several processes if need be; one is copied at a time.

    8 bytes    length of the header, little-endian
    header     JSON: dtype, shape and place of each tensor; padded with spaces
    data       the tensors, without holes

Where everything stands is known before anything is written. So whoever has a piece puts it in its place, in
any order, and the header comes last. (Format: https://github.com/huggingface/safetensors)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

from xtrain.contract import StateForm

if TYPE_CHECKING:
    import torch

Shape: TypeAlias = "tuple[int, ...]"

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's names and the format's, of all that a checkpoint may hold."""
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
"""The others have 1."""
_METADATA = {"format": "pt"}
"""Hugging Face refuses a file that does not say whose tensors it holds."""


@dataclass(frozen=True)
class FileLayout:
    """What stands where in one file: tensors in the order of falling item sizes, so that each is aligned."""

    places: Mapping[str, range]
    """Bytes of the data, by key."""
    item_bytes: Mapping[str, int]
    header: bytes

    @classmethod
    def of(cls, forms: Mapping[str, StateForm]) -> FileLayout:
        """ValueError names a tensor whose dtype is not in DTYPES."""
        items = {key: item_bytes(key, form.dtype) for key, form in forms.items()}
        places: dict[str, range] = {}
        entries: dict[str, object] = {"__metadata__": _METADATA}
        end = 0
        for key in sorted(forms, key=lambda key: -items[key]):
            begin, end = end, end + items[key] * math.prod(forms[key].shape)
            places[key] = range(begin, end)
            dtype, shape = DTYPES[forms[key].dtype], list(forms[key].shape)
            entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(entries, separators=(",", ":")).encode()
        return cls(places, items, text.ljust(math.ceil(len(text) / 8) * 8))

    @property
    def data_bytes(self) -> int:
        return sum(map(len, self.places.values()))


def item_bytes(key: str, dtype: str) -> int:
    """Of torch's dtype; ValueError where a checkpoint cannot hold it."""
    if dtype not in DTYPES:
        raise ValueError(f"{key} has dtype torch.{dtype}, which a checkpoint cannot hold")
    return _ITEM_BYTES.get(DTYPES[dtype], 1)


class TensorFile:
    """A file open for writing what belongs into it; other processes may have it open too. Raises OSError."""

    def __init__(self, path: Path, layout: FileLayout) -> None:
        self._layout = layout
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), "wb")

    def write(self, key: str, value: torch.Tensor, begin: int = 0) -> int:
        """Elements of a tensor, from its element `begin` on; returns their bytes."""
        import torch

        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        place = self._layout.places[key]
        first = place.start + begin * self._layout.item_bytes[key]
        if first + flat.numel() > place.stop:
            raise ValueError(f"{key}: {flat.numel()} bytes from byte {first - place.start} on do not fit")
        self._file.seek(8 + len(self._layout.header) + first)
        self._file.write(flat.numpy().data)
        return flat.numel()

    def write_header(self) -> None:
        self._file.seek(0)
        self._file.write(len(self._layout.header).to_bytes(8, "little") + self._layout.header)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
