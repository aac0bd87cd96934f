"""From a spec and the words of a command line to what is planned: whose model, whose layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xtrain import registry
from xtrain.errors import BackendError, RequestError
from xtrain.plan.auto import rungs
from xtrain.plan.ladder import Rung, Subject, possible
from xtrain.plan.layout import DEVICE, HOST, Layout, Planned
from xtrain.plan.models import planned_model
from xtrain.spec.check import check_spec
from xtrain.spec.tree import Spec


@dataclass(frozen=True)
class Named:
    """What is planned, in words."""

    subject: Subject
    model: str
    backend: str
    auto: Sequence[Rung]
    """What `memory: auto` would try, in that order; empty without it."""


def subject_of(spec: Spec, world: int, backend: str | None, device_bytes: float | None) -> Named:
    """RequestError where no backend plans that spec, or the one that is named does not."""
    planned = _named(backend) if backend else _first(spec, world)
    device = HOST if backend == HOST else DEVICE  # of another machine, perhaps
    model = planned_model(spec, device)
    subject = Subject(spec, world, model.bytes, _layouts(planned, world, device), device_bytes)
    auto = _auto(subject, planned, device) if spec.memory == "auto" else []
    name = planned.name if backend or world > 1 else "one device"
    return Named(subject, model.description, name, auto)


def _named(name: str) -> Planned:
    backend: object = registry.load(name)
    if not isinstance(backend, Planned):
        raise BackendError(
            f"--backend: found {name}, expected one of {', '.join(sorted(_all()))}: "
            "it does not say how it lays out memory"
        )
    return backend


def _first(spec: Spec, world: int) -> Planned:
    """The first backend that runs such a spec, on whatever device."""
    found = _all()
    for backend in found.values():
        if not registry.load(backend.name).problems(spec, world):
            return backend
    raise RequestError(
        f"xtrain plan: none of the backends {', '.join(found)} runs this spec with {world} processes; "
        "name one with --backend for its reasons"
    )


def _all() -> dict[str, Planned]:
    """Every backend that can be loaded and plans."""
    found: dict[str, Planned] = {}
    for name in registry.names():
        try:
            backend: object = registry.load(name)
        except BackendError:
            continue  # `xtrain backends` says why
        if isinstance(backend, Planned):
            found[name] = backend
    return found


def _layouts(planned: Planned, world: int, device: str) -> Callable[[Spec], Layout]:
    backend = registry.load(planned.name)

    def layout(spec: Spec) -> Layout:
        if problems := [*check_spec(spec, world), *backend.problems(spec, world)]:
            raise RequestError(f"xtrain plan on backend {planned.name}: {problems[0]}")
        found = planned.layout(spec, world, device)
        if found is None:
            raise RequestError(
                f"xtrain plan: backend {planned.name} decides what to put where once it has the model; "
                "give manual.split, or another --backend"
            )
        return found

    return layout


def _auto(subject: Subject, planned: Planned, device: str) -> list[Rung]:
    """What `memory: auto` would try."""
    tried = rungs(subject.spec, subject.world, registry.load(planned.name), device)
    return list(possible(subject, [(rung.name, rung.spec) for rung in tried]))
