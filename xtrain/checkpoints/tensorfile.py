"""One safetensors file, written tensor by tensor: never more than one of them is copied.

    8 bytes    length of the header, little-endian
    header     JSON: dtype, shape and place of each tensor; padded with spaces
    data       the tensors, without holes

The header comes first and is known last. So it gets the room that it can need at most, and is filled in
when all is written. (Format: https://github.com/huggingface/safetensors)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

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
_LARGEST = 1 << 63
_METADATA = {"format": "pt"}
"""Hugging Face refuses a file that does not say whose tensors it holds."""


class TensorFile:
    """Takes tensors in the order of falling item sizes, so that each is aligned.

    Raises OSError when the disk does, ValueError for a dtype that is not in DTYPES.
    """

    def __init__(self, path: Path, room: Mapping[str, Shape]) -> None:
        """`room`: every key that may come, with its shape."""
        self.path = path
        self._entries: dict[str, object] = {}
        most = {key: _entry("BOOL", shape, _LARGEST, _LARGEST) for key, shape in room.items()}
        self._header_bytes = len(_header(most))
        self._data_bytes = 0
        self._file = path.open("wb")
        self._file.seek(8 + self._header_bytes)

    def add(self, key: str, tensor: torch.Tensor) -> None:
        import torch

        dtype = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"{key} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        begin, self._data_bytes = self._data_bytes, self._data_bytes + flat.numel()
        self._entries[key] = _entry(dtype, tuple(tensor.shape), begin, self._data_bytes)
        self._file.write(flat.numpy().data)

    def finish(self) -> None:
        """Fill in the header; the content is not on the disk before it is synced."""
        header = _header(self._entries)
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little"))
        self._file.write(header.ljust(self._header_bytes))
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _entry(dtype: str, shape: Shape, begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _header(entries: Mapping[str, object]) -> bytes:
    text = json.dumps({"__metadata__": _METADATA, **entries}, separators=(",", ":")).encode()
    return text.ljust(math.ceil(len(text) / 8) * 8)  # data begins at a multiple of 8
