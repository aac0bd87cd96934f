"""The order of the data and its masks: formulas of (seed, place), nothing stored, nothing iterated."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from xtrain.data.hashing import key, mix, threshold

_ROUNDS = 8


class Permutation:
    """The numbers 0..count-1, shuffled anew for every epoch of an endless stream.

    A keyed bijection instead of a shuffled list: x is a place (row, column) in a table of rows x columns
    cells, barely more than `count`. Each round of the Feistel network shifts the row by a hash of the
    column, then the column by a hash of the row, modulo their numbers; undone by shifting back, hence a
    bijection of the table. A result outside 0..count-1 goes through again (cycle walking) until it is
    inside, which keeps the bijection. So position 10^12 costs what position 0 does.
    """

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"cannot permute {count} numbers")
        self.count = count
        self._key = key(seed, "order")
        rows = math.isqrt(count - 1) + 1
        self._rows, self._columns = np.uint64(rows), np.uint64(-(-count // rows))

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands at `positions` (>= 0) of the stream; epoch e has e * count .. (e + 1) * count - 1."""
        epochs, places = np.divmod(positions.astype(np.uint64), np.uint64(self.count))
        keys = mix(self._key + epochs)
        numbers = self._shuffle(places, keys)
        while (outside := numbers >= np.uint64(self.count)).any():
            numbers[outside] = self._shuffle(numbers[outside], keys[outside])
        return numbers.astype(np.int64)

    def _shuffle(self, cells: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
        row, column = np.divmod(cells, self._columns)
        for number in range(_ROUNDS):
            round_keys = mix(keys + np.uint64(number))
            row = (row + mix(round_keys ^ column) % self._rows) % self._rows
            column = (column + mix(~round_keys ^ row) % self._columns) % self._columns
        return row * self._columns + column


class Mask:
    """Which targets count, when a share of them is masked: a hash of (seed, sequence, position)."""

    def __init__(self, share: float, seed: int, seq_len: int) -> None:
        self.share = share
        self._threshold = threshold(share)
        self._key = key(seed, "mask")
        self._positions = np.arange(seq_len, dtype=np.uint64)

    def counted(self, sequences: NDArray[np.int64]) -> NDArray[np.bool_]:
        """True where a target has a loss: [len(sequences), seq_len].

        Each sequence keeps at least one target, the one with the greatest hash: a batch without any
        would have no mean loss.
        """
        rows = sequences.astype(np.uint64)[:, None] * np.uint64(len(self._positions))
        words = mix(self._key + rows + self._positions)
        counted: NDArray[np.bool_] = words >= self._threshold
        counted[np.arange(len(sequences)), words.argmax(axis=1)] = True
        return counted
