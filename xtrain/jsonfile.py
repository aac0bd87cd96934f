"""JSON that someone else wrote: small, plain, one mapping, no key twice. Anything else is a RequestError."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtrain.contract import Problem
from xtrain.errors import RequestError, SpecError
from xtrain.printable import printable

MAX_BYTES = 1 << 20
MAX_DEPTH = 20


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that the file at `path` holds; numbers are finite."""
    text = _read_text(path)
    try:
        data = json.loads(text, object_pairs_hook=_mapping)
    except json.JSONDecodeError as error:
        raise _refused(path, f"{error.lineno}:{error.colno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise _refused(path, f"nested more than {MAX_DEPTH} deep") from error
    except ValueError as error:  # a key twice, a number of thousands of digits
        raise _refused(path, str(error)) from error
    if not isinstance(data, dict):
        raise _refused(path, "expected a mapping, such as {...}, at the top level")
    if _depth(data) > MAX_DEPTH:
        raise _refused(path, f"nested more than {MAX_DEPTH} deep")
    if problems := list(_not_finite(data)):
        raise SpecError(str(path), problems)
    return data


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise _refused(path, f"cannot be read: {reason}") from error
    if len(content) > MAX_BYTES:
        raise _refused(path, "larger than 1 MiB, which no config is")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refused(path, f"byte {error.start + 1} is not UTF-8") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice; keep one")
        found[key] = value
    return found


def _not_finite(value: Any, key: str = "") -> Iterator[Problem]:
    """NaN and Infinity, which Python reads beside what JSON has, and what is too large for a float."""
    if isinstance(value, float) and not math.isfinite(value):
        yield Problem(key, json.dumps(value), "expected a finite number")
    elif isinstance(value, dict):
        for name, below in value.items():
            yield from _not_finite(below, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for place, below in enumerate(value):
            yield from _not_finite(below, f"{key}.{place}")


def _depth(value: Any) -> int:
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(one) for one in below), default=0)


def _refused(path: Path, why: str) -> RequestError:
    return RequestError(printable(f"{path}: {why}"))
