"""`xtrain check`: everything that can be said about a spec without starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from xtrain import registry
from xtrain.contract import JSON, Problem
from xtrain.errors import SpecError
from xtrain.spec import load_spec


@dataclass(frozen=True)
class Checked:
    """One spec and what is wrong with it."""

    path: Path
    problems: tuple[Problem, ...]
    message: str

    def __str__(self) -> str:
        return f"error: {self.message}" if self.problems else f"{self.path}: ok{self.message}"

    def as_json(self) -> dict[str, JSON]:
        return {"spec": str(self.path), "problems": [asdict(problem) for problem in self.problems]}


def check_file(path: Path, overrides: Sequence[str], backend: str | None, world: int | None) -> Checked:
    """Read and check one spec; with `backend` also ask that backend, with `world` processes."""
    try:
        spec = load_spec(path, overrides, world=world)
        if backend is not None:
            found = registry.load(backend).problems(spec, world or spec.launch.processes)
            if found:
                raise SpecError(f"{path}, on backend {backend},", found)
    except SpecError as error:
        return Checked(path, error.problems, str(error))
    return Checked(path, (), f" on {backend}" if backend else "")
