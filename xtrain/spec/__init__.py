"""The spec: read, checked, complete. Every problem of a file is reported at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from xtrain.contract import JSON, Problem
from xtrain.errors import SpecError
from xtrain.spec.check import check_spec
from xtrain.spec.overrides import Overrides
from xtrain.spec.problems import translate
from xtrain.spec.reader import Document, Unreadable, read_file
from xtrain.spec.tree import Spec

__all__ = ["Spec", "dump_spec", "load_spec"]


def load_spec(path: Path, overrides: Sequence[str] = (), world: int | None = None) -> Spec:
    """Read, validate and check the spec at `path`, with each of `overrides` ("train.steps=20") applied.

    `world` is the number of processes where it is not launch.processes. SpecError has every problem.
    """
    try:
        document = read_file(path)
    except Unreadable as error:
        raise SpecError(str(path), [error.problem]) from error
    changes = Overrides()
    changes.apply(document.data, overrides)
    early = [*document.problems, *changes.problems]
    spec, wrong = _validate(document.data, world)
    told = {problem.path for problem in early}
    late = [_placed(problem, document, changes) for problem in wrong if problem.path not in told]
    if problems := sorted([*early, *late], key=_order):
        raise SpecError(str(path), problems)
    assert spec is not None
    return spec


def dump_spec(spec: Spec) -> dict[str, JSON]:
    """The complete spec as JSON; Spec.model_validate takes it back."""
    complete: dict[str, JSON] = json.loads(spec.model_dump_json(by_alias=True))
    return complete


def _validate(data: JSON, world: int | None) -> tuple[Spec | None, list[Problem]]:
    """The spec, and what is wrong with it: keys first, and only when all fit, how they go together."""
    try:
        spec = Spec.model_validate(data)
    except ValidationError as error:
        return None, translate(error, data)
    return spec, check_spec(spec, world)


def _placed(problem: Problem, document: Document, changes: Overrides) -> Problem:
    """The problem with its place: the override that it comes from, or line and column."""
    if origin := changes.origin(problem.path):
        return replace(problem, origin=origin)
    places = document.values if problem.found else document.keys
    key = problem.path
    while key and key not in places:
        key, places = key.rpartition(".")[0], document.keys
    mark = places.get(key)
    return replace(problem, line=mark.line, column=mark.column) if mark is not None else problem


def _order(problem: Problem) -> tuple[bool, int, int, str]:
    """As the file reads; what has no place in it comes last."""
    return problem.line is None, problem.line or 0, problem.column or 0, problem.path
