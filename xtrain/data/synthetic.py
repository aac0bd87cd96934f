"""A language by formula: learnable, of any length, byte for byte the same on every machine.

Documents of 511 symbols, a separator after each. A symbol follows from the *classes* (mod 8) of the two
before it, through a table of 64 entries, with probability 0.85; else it is noise, uniform over all
symbols. So there is something to learn at every depth: which symbols are in the table, what one symbol
tells of the next, what two tell together.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from xtrain.data.hashing import key, mix, threshold

VERSION = 1
"""Changes when the language does, so that no cache mixes the two."""

DOCUMENT = 512
"""Tokens of a document with its separator."""

MINIMUM_VOCABULARY = 3

_CLASSES = 8
_TABLE = key("synthetic table", 33)  # of sixty tables, the one whose second symbol back tells most
_NOISE = threshold(0.15)
_DOCUMENTS_PER_BLOCK = 4096


def blocks(length: int, vocab_size: int) -> Iterator[NDArray[np.int64]]:
    """The first `length` tokens of the language over `vocab_size` ids, the last of them the separator.

    A recurrence runs along each document, so documents are made side by side, a block of them at once.
    """
    for start in range(0, length, _DOCUMENTS_PER_BLOCK * DOCUMENT):
        wanted = min(length - start, _DOCUMENTS_PER_BLOCK * DOCUMENT)
        count = -(-wanted // DOCUMENT)
        yield _documents(start // DOCUMENT, count, vocab_size).reshape(-1)[:wanted]


def _documents(first: int, count: int, vocab_size: int) -> NDArray[np.int64]:
    """Documents first..first + count - 1: [count, DOCUMENT]."""
    symbols = vocab_size - 1
    table = _draw(mix(_TABLE + np.arange(_CLASSES**2, dtype=np.uint64)), symbols)
    documents = np.arange(first, first + count, dtype=np.uint64) * np.uint64(DOCUMENT)
    noise_key = key("synthetic noise")
    tokens = np.empty((DOCUMENT, count), np.int64)  # by place, so that each step writes one row
    for place in range(DOCUMENT - 1):
        words = mix(noise_key + documents + np.uint64(place))
        noise = _draw(mix(words), symbols)
        if place < 2:
            tokens[place] = noise
            continue
        context = tokens[place - 2] % _CLASSES * _CLASSES + tokens[place - 1] % _CLASSES
        tokens[place] = np.where(words < _NOISE, noise, table[context])
    tokens[-1] = symbols
    return np.ascontiguousarray(tokens.T)


def _draw(words: NDArray[np.uint64], choices: int) -> NDArray[np.int64]:
    return (words % np.uint64(choices)).astype(np.int64)
