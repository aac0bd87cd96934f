"""`xtrain translate`: the config that a backend makes of a spec, and where each value of it comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtrain import registry
from xtrain.contract import JSON
from xtrain.errors import BackendError, SpecError
from xtrain.exchange.translation import Setting, Translator, elsewhere, nested, translators
from xtrain.spec import Spec, load_spec, locate
from xtrain.spec.keys import changed_keys

FIRST_CHOICE = (
    "memory: auto chooses techniques when a run starts, by the room on its device; this is the config of "
    "its first choice, no technique at all: --set memory={...} shows another one, and a run keeps the one it "
    "chose in its run directory"
)


def translate_file(
    path: Path, overrides: Sequence[str], name: str | None, world: int | None, standalone: bool
) -> tuple[Spec, list[Setting]]:
    """The spec at `path` and its translation by the backend `name` (default: the one that has a config).

    Raises SpecError for what the backend, or a standalone config, cannot honour.
    """
    backend = find_translator(name)
    spec = load_spec(path, overrides, world, elsewhere(registry.load(backend.name)), here=False)
    processes = world or spec.launch.processes
    if not standalone:
        return spec, backend.translation(spec, processes)
    if problems := backend.standalone_problems(spec, processes):
        places = locate(problems, path, overrides, world)
        raise SpecError(f"{path}, as a config for {backend.name} alone,", places)
    return spec, backend.standalone(spec, processes)


def find_translator(name: str | None) -> Translator:
    """The backend `name`, or the only one there is; BackendError when it has no config of its own."""
    if name is not None:
        backend: object = registry.load(name)
        if not isinstance(backend, Translator):
            known = ", ".join(translators()) or "none"
            raise BackendError(
                f"backend {name!r} has no config to translate a spec to: it takes the spec as it is. "
                f"Backends with one: {known}"
            )
        return backend
    found = translators()
    if not found:
        raise BackendError("no installed backend has a config of its own; see `xtrain backends`")
    if len(found) > 1:
        raise BackendError(f"several backends have a config: name one with --backend: {', '.join(found)}")
    return next(iter(found.values()))


def origin(setting: Setting, spec: Spec) -> str:
    """Which spec key, default or rule the setting comes from, in a few words."""
    changed = changed_keys(spec)

    def said(key: str) -> str:
        given = (
            key in changed
            or key.partition(".")[0] in changed
            or any(k.startswith(f"{key}.") for k in changed)
        )
        return key if given else f"{key} (default)"

    keys = ", ".join(said(key) for key in setting.spec_keys)
    return f"{keys}: {setting.rule}" if keys and setting.rule else keys or setting.rule


def as_json(settings: Sequence[Setting], spec: Spec, origins: bool) -> JSON:
    """The config itself; with `origins` a list of its keys instead."""
    if not origins:
        return nested(settings)
    return [{"key": s.key, "value": s.value, "origin": origin(s, spec)} for s in settings]


def as_table(settings: Sequence[Setting], spec: Spec) -> str:
    from tabulate import tabulate

    rows: list[tuple[Any, ...]] = [(s.key, json.dumps(s.value), origin(s, spec)) for s in settings]
    return tabulate(rows, headers=["key", "value", "from"], tablefmt="simple", disable_numparse=True)


def notes(spec: Spec, name: str | None) -> list[str]:
    """What a person should know of the config that the backend `name` makes of `spec`, a sentence each."""
    found = find_translator(name).translation_notes(spec)
    return [*found, FIRST_CHOICE] if spec.memory == "auto" else found
