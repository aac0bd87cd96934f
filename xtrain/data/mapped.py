"""Memory maps that do not count as memory."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import NDArray


def give_back_pages(tokens: NDArray[Any]) -> None:
    """Unmap what was read of a mapped file; it stays in the system's cache, but is no memory of this process.

    Reading at random would otherwise make the whole file resident, piece by piece. An array that is no map
    is left alone.
    """
    base: Any = tokens
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)
