"""Memory maps that do not count as memory."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_at_random(tokens: NDArray[Any]) -> None:
    """From here on the system reads of a mapped file what is asked for, and nothing after it.

    Sequences are taken from all over the file: reading ahead fetches megabytes (`read_ahead_kb`) for each few
    hundred bytes. An array that is no map is left alone.
    """
    _advise(tokens, "MADV_RANDOM")


def give_back_pages(tokens: NDArray[Any]) -> None:
    """Unmap what was read of a mapped file; it stays in the system's cache, but is no memory of this process.

    Reading at random would otherwise make the whole file resident, piece by piece. An array that is no map
    is left alone.
    """
    _advise(tokens, "MADV_DONTNEED")


def _advise(tokens: NDArray[Any], advice: str) -> None:
    base: Any = tokens
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, advice):
        base.madvise(getattr(mmap, advice))
