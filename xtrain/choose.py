"""Which backend runs a spec: the one that was named, or the one that suits this machine best."""

from __future__ import annotations

from dataclasses import dataclass

from xtrain import registry
from xtrain.contract import Availability, Backend, Problem
from xtrain.errors import BackendError, SpecError
from xtrain.exchange.translation import elsewhere
from xtrain.spec.tree import Spec

AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    backend: Backend
    reason: str


def choose(name: str, spec: Spec, world: int, source: str) -> Choice:
    """The backend for `spec` with `world` processes; `source` names the spec in messages.

    `auto` takes, of the backends that are usable here, the one with the highest preference that can
    honour the spec. Raises BackendError when none is usable, SpecError with every reason when the spec
    cannot be honoured.
    """
    return _automatic(spec, world, source) if name == AUTO else _named(name, spec, world, source)


def most_able(spec: Spec, world: int) -> str:
    """The backend that comes nearest to honouring `spec` with `world` processes, on whatever machine."""

    def lacks(name: str) -> tuple[bool, int]:
        problems = elsewhere(registry.load(name)).problems(spec, world)
        return any(problem.path == "launch.processes" for problem in problems), len(problems)

    return min(registry.names(), key=lacks)


def _named(name: str, spec: Spec, world: int, source: str) -> Choice:
    backend = registry.load(name)
    available = backend.probe()
    if not available.usable:
        usable = ", ".join(n for n, other in registry.survey().items() if other.usable)
        raise BackendError(
            f"backend {name!r} cannot run here\n  {available.reason}. Usable: {usable}.\n"
            "  See `xtrain backends` for details."
        )
    _refuse(source, name, backend.problems(spec, world))
    return Choice(backend, available.reason)


def _automatic(spec: Spec, world: int, source: str) -> Choice:
    usable = _by_preference(registry.survey())
    if not usable:
        raise BackendError("no backend is usable here; see `xtrain backends` for the reasons")
    passed_over: list[str] = []
    for name, available in usable:
        backend = registry.load(name)
        problems = backend.problems(spec, world)
        if not problems:
            because = f"; {'; '.join(passed_over)}" if passed_over else ""
            return Choice(backend, f"{available.reason}{because}")
        passed_over.append(f"{name} cannot: {problems[0]}")
    best = usable[0][0]
    _refuse(source, best, registry.load(best).problems(spec, world))
    raise AssertionError("a backend without problems is chosen above")


def _by_preference(found: dict[str, Availability]) -> list[tuple[str, Availability]]:
    candidates = [(name, a) for name, a in found.items() if a.usable and a.preference is not None]
    return sorted(candidates, key=lambda pair: -(pair[1].preference or 0))


def _refuse(source: str, name: str, problems: list[Problem]) -> None:
    if problems:
        raise SpecError(f"{source}, on backend {name},", problems)
