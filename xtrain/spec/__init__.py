"""The spec: read, checked, complete. Every problem of a file is reported at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from xtrain.contract import JSON
from xtrain.errors import SpecError
from xtrain.spec.check import check_spec
from xtrain.spec.reader import Document, Unreadable, parse, read_file
from xtrain.spec.tree import Spec

__all__ = ["Spec", "dump_spec", "load_spec"]


def load_spec(path: Path, overrides: Sequence[str] = (), world: int | None = None) -> Spec:
    """Read, validate and check a spec; `world` is the number of processes where it is not launch.processes."""
    try:
        document = read_file(path)
    except Unreadable as error:
        raise SpecError(str(path), [error.problem]) from error
    for override in overrides:
        key, _, text = override.partition("=")
        section = document.data
        *parents, last = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = parse(text).data
    spec = Spec.model_validate(document.data)
    if problems := check_spec(spec, world):
        raise SpecError(str(path), problems)
    return spec


def dump_spec(spec: Spec) -> dict[str, JSON]:
    """The complete spec as JSON; Spec.model_validate takes it back."""
    complete: dict[str, JSON] = json.loads(spec.model_dump_json(by_alias=True))
    return complete
