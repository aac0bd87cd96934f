"""Numbers that look random but are a formula of their place: the same on every machine, in any order.

All randomness of the data is SplitMix64, Steele, Lea and Flood's mixing of a 64-bit counter, in integer
arithmetic that wraps. There is no state to carry, so anything can be asked for at any place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD = 64
_MASK = (1 << WORD) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mix(counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 of each counter: a bijection of 64-bit words, same shape (at least one dimension)."""
    z = counters + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _FIRST
    z = (z ^ (z >> np.uint64(27))) * _SECOND
    return z ^ (z >> np.uint64(31))


def key(*parts: int | str) -> np.uint64:
    """One 64-bit word that stands for `parts`, such as (seed, "order"). Integers count modulo 2^64."""
    word = np.zeros(1, np.uint64)
    for part in parts:
        number = int.from_bytes(part.encode(), "little") if isinstance(part, str) else part
        word = mix(word ^ np.uint64(number & _MASK))
    return np.uint64(word[0])


def threshold(share: float) -> np.uint64:
    """Words below it are that share of all words; `share` in [0, 1)."""
    return np.uint64(int(share * 2**WORD))
