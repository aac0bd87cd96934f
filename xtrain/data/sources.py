"""From `data.source` to one long stream of tokens."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from xtrain.data import synthetic
from xtrain.data.cache import FORMAT, Ids, TokenCache, open_cache
from xtrain.data.text import find_files, read_blocks, stdlib_files
from xtrain.data.tokenfile import TokenFile, open_token_file
from xtrain.data.tokenizers import Tokenizer, load_tokenizer
from xtrain.errors import RequestError
from xtrain.models.presets import GPT2_VOCABULARY
from xtrain.spec.tree import Spec

SYNTHETIC_TOKENS = 1_000_000
BYTE_VOCABULARY = 257


@dataclass(frozen=True)
class TokenStream:
    """All tokens of a run, documents one after the other."""

    tokens: Ids
    """1-D, usually mapped from the disk"""
    vocab_size: int
    content_hash: str
    origin: str
    """Where they are from, for people: "stdlib: 412 files, 8.1 MB text"."""
    portable: bool = True
    """Whether the same spec gives the same tokens on another machine."""
    unchecked: Path | None = None
    """The file whose ids could not all be checked at the start."""


def open_stream(spec: Spec, *, show_progress: bool) -> TokenStream:
    """The tokens of `spec.data`, from the cache where they are there.

    Raises RequestError for data that is missing, unreadable, or has ids the model has not.
    """
    cache = open_cache(show_progress=show_progress)
    match spec.data.source:
        case "stdlib" | "text":
            stream = _text_stream(spec, cache, show_progress=show_progress)
        case "synthetic":
            stream = _synthetic_stream(spec, cache)
        case "tokens":
            stream = _file_stream(spec, cache)
        case other:
            raise RequestError(
                f"data.source: {other} is not built yet; use stdlib, text, tokens or synthetic"
            )
    _check_vocabulary(spec, stream)
    return stream


def _text_stream(spec: Spec, cache: TokenCache, *, show_progress: bool) -> TokenStream:
    stdlib = spec.data.source == "stdlib"
    files = stdlib_files() if stdlib else find_files(spec.data.path)
    tokenizer = load_tokenizer(spec.data.tokenizer, trust_remote_code=spec.model.trust_remote_code)
    digest = cache.remember(files, "bytes of files", lambda: _digest(files))
    total_bytes = sum(path.stat().st_size for path in files)

    def pieces() -> Iterator[Ids]:
        shown = show_progress and sys.stderr.isatty()
        with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokens", disable=not shown) as bar:
            for ids, size in _encode(files, tokenizer, errors="replace" if stdlib else "strict"):
                bar.update(size)
                yield ids

    key = _key("text", digest, tokenizer.identity, "replace" if stdlib else "strict")
    stored = cache.tokens(key, tokenizer.vocab_size, pieces)
    count = f"{len(files):,} file{'s' if len(files) != 1 else ''}"
    return TokenStream(
        stored.tokens,
        tokenizer.vocab_size,
        stored.content_hash,
        origin=f"{spec.data.source}: {count}, {total_bytes / 1e6:,.1f} MB text",
        portable=not stdlib,
    )


def _encode(files: Sequence[Path], tokenizer: Tokenizer, *, errors: str) -> Iterator[tuple[Ids, int]]:
    """(ids, bytes read) piece by piece, the separator between documents; empty documents leave none."""
    separator = np.array([tokenizer.separator])
    between = False
    for path in files:
        begun = False
        for text, size in read_blocks(path, errors=errors):
            ids = tokenizer.encode(text)
            if len(ids) and between and not begun:
                yield separator, 0
            begun = begun or len(ids) > 0
            yield ids, size
        between = between or begun


def _digest(files: Sequence[Path]) -> str:
    """Hash of each file's bytes, in order; their names do not matter to the tokens."""
    hasher = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                hasher.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise RequestError(f"data.path: {path} cannot be read: {error.strerror or error}") from error
    return hasher.hexdigest()


def _synthetic_stream(spec: Spec, cache: TokenCache) -> TokenStream:
    length = spec.data.tokens or SYNTHETIC_TOKENS
    vocab_size = spec.model.vocab_size or BYTE_VOCABULARY
    if vocab_size < synthetic.MINIMUM_VOCABULARY:
        raise RequestError(
            f"model.vocab_size: found {vocab_size}; "
            f"the synthetic language needs {synthetic.MINIMUM_VOCABULARY} or more"
        )
    key = _key("synthetic", synthetic.VERSION, length, vocab_size)
    stored = cache.tokens(key, vocab_size, lambda: synthetic.blocks(length, vocab_size))
    return TokenStream(stored.tokens, vocab_size, stored.content_hash, origin="synthetic")


def file_vocabulary(spec: Spec) -> int:
    """Of a file of tokens; it is looked through for its largest id where no cache remembers that."""
    return _file_vocabulary(spec, _token_file(spec, open_cache(show_progress=False)))


def _token_file(spec: Spec, cache: TokenCache) -> TokenFile:
    paths = find_files(spec.data.path)
    if len(paths) > 1:
        raise RequestError(f"data.path: found {len(paths)} files; source tokens takes one, join them first")
    return open_token_file(paths[0], cache)


def _file_stream(spec: Spec, cache: TokenCache) -> TokenStream:
    file = _token_file(spec, cache)
    return TokenStream(
        file.tokens,
        _file_vocabulary(spec, file),
        file.content_hash,
        origin=f"tokens: {file.path.name}",
        unchecked=None if file.scanned else file.path,
    )


def _file_vocabulary(spec: Spec, file: TokenFile) -> int:
    """The model's vocabulary where it is known before the data, else what the file needs."""
    declared = spec.model.vocab_size
    if declared is None and spec.model.preset not in (None, "gpt2-nano"):
        declared = GPT2_VOCABULARY  # the other presets' own
    if declared is None and not file.scanned:
        raise RequestError(
            f"model.vocab_size is missing: {file.path} is too large to be searched for its largest id; "
            "say how many ids the tokenizer that made it has"
        )
    return max(file.largest + 1, declared or 0)


def _check_vocabulary(spec: Spec, stream: TokenStream) -> None:
    """An id at or beyond the model's vocabulary has no embedding."""
    given = spec.model.vocab_size
    if given is not None and stream.vocab_size > given:
        raise RequestError(
            f"model.vocab_size: found {given}, but the data ({stream.origin}) has {stream.vocab_size} "
            f"symbols; set it to {stream.vocab_size} or more"
        )


def _key(*parts: object) -> str:
    return hashlib.sha256(repr((FORMAT, *parts)).encode()).hexdigest()[:32]
