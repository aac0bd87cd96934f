"""The token cache: a folder of finished token streams, keyed by content, read through memory maps.

    <folder>/<key>/tokens.bin     ids, little-endian, of the smallest unsigned type that holds the vocabulary
    <folder>/<key>/about.json     their type, count and hash: what tokens.bin must be, to be trusted
    <folder>/<key>.building-*/    an entry in the making: renamed to <key> when whole, never read before
    <folder>/<key>.lock           held by its builder; the system releases it when the builder dies
    <folder>/facts/*.json         what was found out about large files, by path, size and time of change

A killed builder leaves a `.building-` folder whose lock is free: the next builder sweeps it.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from xtrain.contract import JSON
from xtrain.durable import flush
from xtrain.errors import RequestError

FORMAT = 1
"""Part of every key: a change of the layout or of the tokenisation makes old entries unseen."""

_SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again within the same tick of its clock."""

Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Stored:
    """One token stream, mapped from the disk."""

    tokens: Ids
    """1-D"""
    content_hash: str


class TokenCache:
    """Token streams and facts under one folder, shared by any number of processes."""

    def __init__(
        self, folder: Path, *, required: bool = False, say: Callable[[str], None] | None = None
    ) -> None:
        """`required`: a folder that cannot be written is an error; else a temporary one stands in."""
        self.folder = folder
        self._required = required
        self._say = say or _keep_quiet

    def tokens(self, key: str, vocab_size: int, pieces: Callable[[], Iterable[Ids]]) -> Stored:
        """The stream stored under `key`; where there is none, that of `pieces()`, stored first.

        Raises RequestError when the folder cannot be written, and whatever `pieces` raises.
        """
        stored = _load(self.folder / key)
        if stored is not None:
            return stored
        self._make_writable()
        self._sweep()
        with self._locked(key):
            return _load(self.folder / key) or self._build(key, vocab_size, pieces())

    def remember(self, files: Sequence[Path], question: str, answer: Callable[[], JSON]) -> JSON:
        """`answer()`, kept for as long as the files have the same paths, sizes and times of change."""
        path = self.folder / "facts" / f"{_stamp(files, question)}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            known: JSON = json.loads(path.read_text())["answer"]
            return known
        found = answer()
        newest = max(file.stat().st_mtime_ns for file in files)
        if newest < time.time_ns() - _SETTLED_NS:
            with suppress(OSError):  # a fact that cannot be kept is found out again
                _write_whole(path, json.dumps({"question": question, "answer": found}))
        return found

    def _build(self, key: str, vocab_size: int, pieces: Iterable[Ids]) -> Stored:
        building = self.folder / f"{key}.building-{secrets.token_hex(4)}"
        try:
            building.mkdir()
            about = _write_tokens(building / "tokens.bin", vocab_size, pieces)
            _write_whole(building / "about.json", json.dumps(about))
            stored = _load(building)  # mapped before it is public: nobody can take it away any more
            assert stored is not None
            self._publish(building, self.folder / key)
        except OSError as error:
            raise RequestError(
                f"the token cache {self.folder} cannot be written: {error.strerror or error}; "
                "free some space, or set XTRAIN_CACHE to another folder"
            ) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        return stored

    def _publish(self, building: Path, entry: Path) -> None:
        if entry.exists():  # damaged, or it would have been used
            damaged = building.with_name(f"{building.name}-damaged")
            entry.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            building.rename(entry)
        except OSError:
            if not entry.exists():  # else, without locks, another process was first: ours is mapped already
                raise

    def _make_writable(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                return
        except OSError as error:
            problem = f"the token cache {self.folder} cannot be written: {error.strerror or error}"
            if self._required:
                raise RequestError(f"{problem}; set XTRAIN_CACHE to a folder that can") from error
            self._say(
                f"{problem}; using a temporary folder for this run. Set XTRAIN_CACHE to keep the tokens."
            )
        self.folder = Path(tempfile.mkdtemp(prefix="xtrain-cache-"))
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """One builder per key at a time. Without file locks two build the same; the later one stays."""
        with ExitStack() as held:
            with suppress(OSError):  # a file system without locks, or another user's lock
                lock = held.enter_context((self.folder / f"{key}.lock").open("w"))
                self._wait_for(lock)
            yield

    def _wait_for(self, lock: IO[str]) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._say("waiting for another process that prepares the same tokens")
            fcntl.flock(lock, fcntl.LOCK_EX)

    def _sweep(self) -> None:
        """Remove what dead builders left: those whose lock can be had."""
        for building in self.folder.glob("*.building-*"):
            lock = self.folder / f"{building.name.partition('.')[0]}.lock"
            with suppress(OSError), lock.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(building, ignore_errors=True)


def open_cache(*, show_progress: bool) -> TokenCache:
    """The cache in $XTRAIN_CACHE, or in this platform's folder for caches."""
    say = _tell if show_progress else None
    chosen = os.environ.get("XTRAIN_CACHE")
    if chosen:
        return TokenCache(Path(chosen).expanduser(), required=True, say=say)
    caches = (
        "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    )
    try:
        return TokenCache(Path(caches).expanduser() / "xtrain", say=say)
    except RuntimeError as error:
        raise RequestError(
            "there is no home folder for the token cache; set XTRAIN_CACHE to a folder"
        ) from error


def hash_tokens(pieces: Iterable[Ids]) -> str:
    """SHA-256 of the ids as little-endian 32-bit numbers: the same whatever type they are stored in."""
    hasher = hashlib.sha256()
    for piece in pieces:
        hasher.update(piece.astype("<u4").data)
    return hasher.hexdigest()


def _write_tokens(path: Path, vocab_size: int, pieces: Iterable[Ids]) -> dict[str, JSON]:
    dtype = np.min_scalar_type(vocab_size - 1).newbyteorder("<")
    count = 0

    with path.open("wb") as file:

        def written() -> Iterator[Ids]:
            nonlocal count
            for piece in pieces:
                file.write(piece.astype(dtype).data)
                count += len(piece)
                yield piece

        content_hash = hash_tokens(written())
        file.flush()
        flush(file.fileno())
    return {"format": FORMAT, "dtype": dtype.str, "count": count, "content_hash": content_hash}


def _load(entry: Path) -> Stored | None:
    """The stream in `entry`; None where there is none, or where it is not what about.json says."""
    try:
        about: Mapping[str, Any] = json.loads((entry / "about.json").read_text())
        dtype, count, content_hash = np.dtype(about["dtype"]), int(about["count"]), str(about["content_hash"])
        path = entry / "tokens.bin"
        if dtype.kind != "u" or path.stat().st_size != count * dtype.itemsize:
            return None
        if count == 0:  # an empty file cannot be mapped
            return Stored(np.zeros(0, dtype), content_hash)
        return Stored(np.asarray(np.memmap(path, dtype, mode="r")), content_hash)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_whole(path: Path, text: str) -> None:
    """Write under another name, then rename: `path` is absent or whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    partial.write_text(text)
    partial.replace(path)


def _stamp(files: Sequence[Path], question: str) -> str:
    hasher = hashlib.sha256(f"{FORMAT} {question}".encode())
    for file in files:
        status = file.stat()
        hasher.update(f"\0{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode())
    return hasher.hexdigest()


def _tell(message: str) -> None:
    print(message, file=sys.stderr)


def _keep_quiet(message: str) -> None:
    del message
