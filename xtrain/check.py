"""`xtrain check`: everything that can be said about a spec without starting anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from xtrain import registry
from xtrain.contract import JSON, Foretells, LooksAround, Problem
from xtrain.errors import SpecError
from xtrain.printable import printable
from xtrain.spec import Spec, load_spec, locate


@dataclass(frozen=True)
class Checked:
    """One spec and what is wrong with it."""

    path: Path
    problems: tuple[Problem, ...]
    message: str
    warnings: tuple[Problem, ...] = ()
    """What is in the way on this machine only: the spec may be for another one."""
    notes: tuple[str, ...] = ()
    """What a run would say at its start."""

    def __str__(self) -> str:
        return f"error: {self.message}" if self.problems else f"{printable(str(self.path))}: {self.message}"

    def as_json(self) -> dict[str, JSON]:
        return {
            "spec": str(self.path),
            "problems": [asdict(problem) for problem in self.problems],
            "warnings": [asdict(warning) for warning in self.warnings],
            "notes": list(self.notes),
        }


def check_file(path: Path, overrides: Sequence[str], backend: str | None, world: int | None) -> Checked:
    """Read and check one spec; with `backend` also ask that backend, with `world` processes."""
    asked = registry.load(backend) if backend is not None else None
    try:
        spec = load_spec(path, overrides, world, asked)
    except SpecError as error:
        return Checked(path, error.problems, str(error))
    missing: list[Problem] = asked.missing_here(spec) if isinstance(asked, LooksAround) else []
    warnings = locate(missing, path, overrides, world) if missing else []
    processes = world or spec.launch.processes
    notes: list[str] = asked.notes(spec, processes) if isinstance(asked, Foretells) else []
    on = f" on {backend}" if backend else ""
    message = f"ok{on}: {summary(spec, processes)}"
    return Checked(path, (), message, tuple(warnings), tuple(notes))


def summary(spec: Spec, world: int) -> str:
    """What `spec` trains, on one line."""
    model = spec.model.preset or spec.model.factory or spec.model.hf or ""
    dtype, weights = spec.precision.dtype, spec.precision.weights
    parts = (
        f"{model} on {spec.data.source}",
        f"{spec.train.steps:,} updates of {spec.batch.global_:,} sequences x {spec.data.seq_len:,} tokens",
        f"{spec.micro_batch:,} at a time on {world} process{'es' if world > 1 else ''}",
        f"{spec.optimizer.name}, lr {spec.optimizer.lr:g}, {spec.schedule.name}",
        dtype if dtype == weights == "fp32" else f"{dtype} with {weights} weights",
    )
    return printable("; ".join(parts))
