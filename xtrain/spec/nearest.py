"""The nearest numbers that would work, for messages."""

from __future__ import annotations

import math
from collections.abc import Sequence

MOST_TRIED = 100_000


def divisors(number: int) -> list[int]:
    """All of them, rising; of a number above MOST_TRIED squared those that a short search finds."""
    small = [d for d in range(1, min(math.isqrt(number), MOST_TRIED) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def multiples(unit: int, *, around: int) -> list[int]:
    """The multiples of `unit` on both sides of `around`, from 1 x `unit` on."""
    below = around // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple]


def neighbours(value: int, candidates: Sequence[int]) -> list[int]:
    """The candidates next to `value` on both sides, `value` itself left out; the candidates rise."""
    below = [c for c in candidates if c < value][-1:]
    above = [c for c in candidates if c > value][:1]
    return below + above


def either(values: Sequence[int]) -> str:
    return " or ".join(str(value) for value in values)
