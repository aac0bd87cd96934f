"""The C library's memory, for engines that compute on the host."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
TRIM_THRESHOLD_BYTES = 1 << 30
MMAP_THRESHOLD_BYTES = 32 << 20
"""The most that glibc takes on 64 bits."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Have glibc keep what a step frees for the next one, instead of giving it back to the system.

    Every step allocates the same activations. By default glibc returns the larger ones at once, and each
    page costs a fault when it is taken again: on a small model 2 to 5% of a step. The price is memory: kept
    blocks do not fit the next ones perfectly (an eighth more growth there), and the process does not shrink
    between steps (docs/decisions.md). Returns whether it was done: not where the user has set the allocator
    up (SETTINGS), nor without glibc.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES) and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    )


def give_back_freed_memory() -> None:
    """Have glibc return what is free to the system, for an attempt that needs it in other sizes."""
    if sys.platform.startswith("linux"):
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
