"""From a file and its overrides to a spec, or to every problem of it with its place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from xtrain.contract import Problem
from xtrain.errors import SpecError
from xtrain.exchange.translation import translators
from xtrain.spec.check import check_spec
from xtrain.spec.keys import covering
from xtrain.spec.overrides import Overrides
from xtrain.spec.problems import find_faults, translate
from xtrain.spec.reader import Document, Unreadable, read_document, read_text
from xtrain.spec.sound import sound_part
from xtrain.spec.tree import Spec


class Judge(Protocol):
    """A backend, or whoever speaks for one, asked what of a spec it cannot honour."""

    name: str

    def problems(self, spec: Spec, world: int) -> list[Problem]: ...


@dataclass(frozen=True)
class Question:
    """What is asked of a spec beside itself."""

    world: int | None
    """Number of processes; None: launch.processes."""
    backend: Judge | None
    here: bool
    """Whether it is to run on this machine."""
    resumes: bool
    """Whether it begins with a checkpoint's weights, whatever weights it names."""


def load_spec(
    path: Path,
    overrides: Sequence[str] = (),
    world: int | None = None,
    backend: Judge | None = None,
    here: bool = True,
    resumes: bool = False,
    text: str | None = None,
) -> Spec:
    """Read, validate and check the spec at `path`, with each of `overrides` ("train.steps=20") applied.

    `world` is the number of processes where it is not launch.processes; `backend` is asked too where it is
    given. Paths in it are looked for if it is to run `here`, those of weights unless it `resumes`. `text` is
    what `path` says, where it was read before. SpecError has every problem.
    """
    document = _read(path, text)
    question = Question(world, backend, here, resumes)
    spec, problems = _examine(document, overrides, question)
    if problems:
        blamed = _blame(problems, document, overrides, question)
        source = f"{path}, on backend {backend.name}," if backend else str(path)
        raise SpecError(source, sorted(blamed, key=_order))
    return spec


def locate(
    problems: Sequence[Problem],
    path: Path,
    overrides: Sequence[str] = (),
    world: int | None = None,
    text: str | None = None,
) -> list[Problem]:
    """Problems that someone else found in the spec at `path`, each placed; `text` as for load_spec."""
    document, changes = _read(path, text), Overrides()
    changes.apply(deepcopy(document.data), overrides)
    return sorted((_placed(problem, document, changes, world) for problem in problems), key=_order)


def spec_text(path: Path) -> str:
    """What the file says; SpecError where it cannot be read."""
    try:
        return read_text(path)
    except Unreadable as error:
        raise SpecError(str(path), [error.problem]) from error


def _read(path: Path, text: str | None) -> Document:
    try:
        return read_document(spec_text(path) if text is None else text)
    except Unreadable as error:
        raise SpecError(str(path), [error.problem]) from error


def _examine(document: Document, overrides: Sequence[str], question: Question) -> tuple[Spec, list[Problem]]:
    """The spec, of which only what is sound is as given, and its problems: one for each key."""
    world = question.world
    data, changes = deepcopy(document.data), Overrides()
    changes.apply(data, overrides)
    found = [*document.problems, *changes.problems]
    faults = find_faults(data)
    spec, unsound = sound_part(data, faults, [problem.path for problem in found])
    refused = list(_asked(question.backend, spec, world, unsound))
    keys = [problem.path for problem in refused if problem.path]
    checked = check_spec(spec, world, unsound, question.here, question.resumes)
    for later in (
        translate(faults, data),
        refused,  # what is refused anyway is not asked for more
        [problem for problem in checked if covering(problem.path, keys) is None],
        _overridden(spec, world, unsound),
    ):
        told = {problem.path for problem in found}
        found += [_placed(problem, document, changes, world) for problem in later if problem.path not in told]
    return spec, found


def _asked(
    backend: Judge | None, spec: Spec, world: int | None, unsound: Collection[str]
) -> Iterator[Problem]:
    """What the backend cannot honour, of the sections that are as given."""
    if backend is not None:
        found = backend.problems(spec, world or spec.launch.processes)
        yield from (problem for problem in found if problem.path.partition(".")[0] not in unsound)


def _overridden(spec: Spec, world: int | None, unsound: Collection[str]) -> Iterator[Problem]:
    """What is wrong in a section of overrides, whichever backend was asked for: one file serves all."""
    if spec.deepspeed and not unsound:
        for translator in translators().values():
            yield from translator.override_problems(spec, world or spec.launch.processes)


def _blame(
    problems: Sequence[Problem],
    document: Document,
    overrides: Sequence[str],
    question: Question,
) -> list[Problem]:
    """The problems; those that would not be there without an override name it instead of a line."""
    causes: dict[Problem, list[str]] = {problem: [] for problem in problems if not problem.origin}
    for override in overrides:
        others = [other for other in overrides if other != override]
        there_anyway = _examine(document, others, question)[1]
        for problem in causes:
            if problem not in there_anyway:
                causes[problem].append(f"--set {override}")
    return [
        replace(problem, origin=" ".join(causes[problem]), line=None, column=None)
        if causes.get(problem)
        else problem
        for problem in problems
    ]


def _placed(problem: Problem, document: Document, changes: Overrides, world: int | None) -> Problem:
    """The problem with its place: the override that it comes from, or line and column."""
    if problem.path == "launch.processes" and world is not None:
        return problem  # the number was asked for elsewhere
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
