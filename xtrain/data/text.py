"""Text files: which ones, and reading them in blocks. Each file is one document."""

from __future__ import annotations

import codecs
import glob
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from xtrain.errors import RequestError

STDLIB_BYTES = 8_000_000
"""Enough of the standard library for a first run, quick to prepare."""

_BLOCK_BYTES = 16 << 20
_TEXT_SUFFIXES = {".py", ".txt", ".rst"}
# Tests are left out because some distributions package them apart.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def stdlib_files() -> list[Path]:
    """Text of the running Python's standard library, by relative name, until STDLIB_BYTES are reached.

    Without tests. The same files at every call on one installation.
    """
    root = Path(sysconfig.get_path("stdlib"))
    candidates: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        candidates += [path for name in names if (path := Path(folder, name)).suffix in _TEXT_SUFFIXES]
    files: list[Path] = []
    total_bytes = 0
    for path in sorted(candidates):
        if total_bytes >= STDLIB_BYTES:
            break
        files.append(path)
        total_bytes += path.stat().st_size
    if not files:
        raise RequestError(
            f"data.source: stdlib found no text in {root}, where this Python's standard library should be; "
            "use `source: synthetic`, or `source: text` with files of your own"
        )
    return files


def find_files(given: str | Sequence[str] | None) -> list[Path]:
    """The files of `data.path`, in the order given; those of a glob sorted by name.

    Raises RequestError for a path that is missing, a folder, or a glob that matches nothing.
    """
    if not given:
        raise RequestError("data.path is missing: expected a file, a list of files, or a glob")
    patterns = [given] if isinstance(given, str) else given
    return [path for pattern in patterns for path in _matches(str(pattern))]


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        raise RequestError(
            f"data.path: {pattern} is a folder; name its files, such as {path / '**' / '*.txt'}"
        )
    if path.exists():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
    files = [match for match in found if match.is_file()]
    if not files:
        problem = "matches no file" if glob.has_magic(pattern) else "does not exist"
        raise RequestError(f"data.path: {pattern} {problem} (looked from {Path.cwd()})")
    return files


def read_blocks(path: Path, *, errors: str = "strict") -> Iterator[tuple[str, int]]:
    """The text of a UTF-8 file as (text, bytes read for it), about 16 MiB at a time, cut at line ends.

    Raises RequestError where the file is not UTF-8 (unless `errors` says "replace") or cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    done_bytes = 0
    try:
        with path.open("rb") as file:
            while True:
                block = file.read(_BLOCK_BYTES)
                block += file.readline(_BLOCK_BYTES) if block else b""
                yield decoder.decode(block, final=not block), len(block)
                if not block:
                    return
                done_bytes += len(block)
    except UnicodeDecodeError as error:
        held_over = len(error.object) - len(block)  # bytes of a character that the block before began
        place = done_bytes - held_over + error.start
        raise RequestError(
            f"data.path: {path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {place:,} "
            f"({error.reason}); convert it, for example `iconv -f latin1 -t utf-8`"
        ) from error
    except OSError as error:
        raise RequestError(f"data.path: {path} cannot be read: {error.strerror or error}") from error
