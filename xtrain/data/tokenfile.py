"""`source: tokens`: a file of token ids that is already there, mapped, never copied into memory.

A .npy file of one dimension and any integer type, or a raw .bin file of little-endian uint16. Up to
SCAN_BYTES it is read once to hash it and to find its smallest and largest id; what was found is
remembered. Beyond that only blocks spread over it are, so that a run starts at once on any size: the
hash then says "sampled:", and ids are checked as they are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtrain.contract import JSON
from xtrain.data.cache import Ids, TokenCache, hash_tokens
from xtrain.errors import RequestError

SCAN_BYTES = 1 << 30
_BLOCK_TOKENS = 1 << 20
_SAMPLES = 64


@dataclass(frozen=True)
class TokenFile:
    path: Path
    tokens: Ids
    """1-D, mapped"""
    content_hash: str
    smallest: int
    largest: int
    scanned: bool
    """Whether all ids were seen; else smallest and largest are of the samples."""


def open_token_file(path: Path, cache: TokenCache) -> TokenFile:
    """Raises RequestError for a file that is not a list of non-negative integers."""
    tokens = _map(path)
    if len(tokens) == 0:
        raise RequestError(f"data.path: {path} holds no tokens")
    scanned = tokens.nbytes <= SCAN_BYTES
    question = f"tokens {tokens.dtype.str} {len(tokens)} {'whole' if scanned else 'sampled'}"
    survey = _survey(cache.remember([path], question, lambda: _look_through(tokens, scanned)))
    file = TokenFile(path, tokens, *survey, scanned=scanned)
    if file.smallest < 0:
        raise RequestError(f"data.path: {path} holds the id {file.smallest}; token ids start at 0")
    return file


def _map(path: Path) -> Ids:
    try:
        if path.suffix == ".npy":
            return _map_npy(path)
        if path.suffix == ".bin":
            return _map_bin(path)
    except OSError as error:
        raise RequestError(f"data.path: {path} cannot be read: {error.strerror or error}") from error
    raise RequestError(
        f"data.path: found {path}; source tokens expects .npy, or .bin of little-endian uint16"
    )


def _map_npy(path: Path) -> Ids:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise RequestError(f"data.path: {path} is not a complete .npy file: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise RequestError(
            f"data.path: {path} holds {array.dtype} of shape {array.shape}; "
            "expected integers of one dimension"
        )
    return np.asarray(array)


def _map_bin(path: Path) -> Ids:
    size = path.stat().st_size
    if size % 2:
        raise RequestError(
            f"data.path: {path} has {size:,} bytes, not a whole number of 2-byte uint16 tokens"
        )
    return np.asarray(np.memmap(path, "<u2", mode="r")) if size else np.zeros(0, "<u2")


def _look_through(tokens: Ids, scanned: bool) -> JSON:
    """Hash, smallest and largest id, of all tokens or of the samples, as the cache keeps them."""
    smallest, largest = int(tokens[0]), int(tokens[0])

    def seen(pieces: Iterator[Ids]) -> Iterator[Ids]:
        nonlocal smallest, largest
        for piece in pieces:
            smallest, largest = min(smallest, int(piece.min())), max(largest, int(piece.max()))
            yield piece

    if scanned:
        content_hash = hash_tokens(seen(_all_blocks(tokens)))
    else:
        digest = hash_tokens(seen(_sampled_blocks(tokens)))
        content_hash = f"sampled:{hashlib.sha256(f'{len(tokens)} {digest}'.encode()).hexdigest()}"
    return [content_hash, smallest, largest]


def _all_blocks(tokens: Ids) -> Iterator[Ids]:
    for start in range(0, len(tokens), _BLOCK_TOKENS):
        yield tokens[start : start + _BLOCK_TOKENS]


def _sampled_blocks(tokens: Ids) -> Iterator[Ids]:
    """Blocks evenly spread, the first and the last ones among them."""
    block = _BLOCK_TOKENS // 16
    for number in range(_SAMPLES):
        start = (len(tokens) - block) * number // (_SAMPLES - 1)
        yield tokens[start : start + block]


def _survey(answer: Any) -> tuple[str, int, int]:
    content_hash, smallest, largest = answer
    return str(content_hash), int(smallest), int(largest)
