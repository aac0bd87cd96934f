"""Finding backends by entry point: nobody imports a backend, everybody looks it up."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from xtrain.contract import Availability, Backend
from xtrain.errors import BackendError

GROUP = "xtrain.backends"


def names() -> list[str]:
    """Every registered backend, without importing any."""
    return sorted({point.name for point in _points()})


def load(name: str) -> Backend:
    """The backend called `name`.

    Raises BackendError when there is none, when two installed packages provide it, or when what
    it needs is not installed.
    """
    matches = [point for point in _points() if point.name == name]
    if not matches:
        known = ", ".join(names()) or "none; run `pip install -e .` first"
        raise BackendError(f"no backend named {name!r}. Installed: {known}")
    providers = sorted({_provider(point) for point in matches})
    if len(providers) > 1:
        raise BackendError(f"backend {name!r} is provided by {' and by '.join(providers)}; uninstall one")
    try:
        return cast(Backend, matches[0].load())
    except ImportError as missing:
        needs = f"needs {missing.name}" if missing.name else f"cannot be imported ({missing})"
        raise BackendError(f"backend {name!r} {needs}; install xtrain[{name}]") from missing


def loadable() -> dict[str, Backend]:
    """Every registered backend that can be loaded; `survey` says why the others cannot."""
    found = {}
    for name in names():
        with suppress(BackendError):
            found[name] = load(name)
    return found


def survey() -> dict[str, Availability]:
    """Every registered backend: usable here or not, and the reason."""

    def probe(name: str) -> Availability:
        try:
            return load(name).probe()
        except BackendError as error:
            return Availability(False, str(error))

    return {name: probe(name) for name in names()}


@cache
def _points() -> tuple[EntryPoint, ...]:
    """Read once: the metadata of all installed packages take longer than a spec's check."""
    return tuple(entry_points(group=GROUP))


def _provider(point: EntryPoint) -> str:
    return f"{point.dist.name} ({point.value})" if point.dist else point.value
