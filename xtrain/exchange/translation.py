"""What a backend can say that is driven by a config of its own: that config, and a spec made from one.

An optional capability: backends without such a config have neither method, and the commands say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from xtrain.contract import JSON, Backend, Problem

if TYPE_CHECKING:
    from xtrain.spec.load import Judge
    from xtrain.spec.tree import Spec

Tree: TypeAlias = dict[str, Any]
"""A spec or a config as plain data."""


@dataclass(frozen=True)
class Setting:
    """One value of a backend's config, and why it is what it is."""

    key: str
    """Dotted place in the config."""
    value: JSON
    spec_keys: tuple[str, ...] = ()
    """The spec's keys that it follows from."""
    rule: str = ""
    """What is done with them, or why it is fixed; empty where the value is the spec key's own."""


@dataclass(frozen=True)
class Imported:
    """A spec, as plain data, that was made from a backend's config."""

    spec: Tree
    """As it would stand in a file."""
    chosen: Mapping[str, str]
    """Dotted spec key -> why it has its value, where the config did not simply say so."""
    left_out: Sequence[str]
    """What the config says and the spec cannot, a sentence each."""
    problems: Sequence[Problem] = ()
    """What of the spec the backend of that config cannot honour, on any machine."""


@runtime_checkable
class Translator(Protocol):
    """The further methods of a Backend that has a config of its own."""

    name: str

    def translation(self, spec: Spec, world: int) -> list[Setting]:
        """The config that `xtrain run` gives to it, concrete, in the order in which it is written."""
        ...

    def translation_problems(self, spec: Spec, world: int) -> list[Problem]:
        """Every key that the backend cannot honour on any machine; `problems` also looks at this one."""
        ...

    def override_problems(self, spec: Spec, world: int) -> list[Problem]:
        """What of the overrides in the spec is unknown, of a wrong kind, or contradicts the rest of it."""
        ...

    def translation_notes(self, spec: Spec) -> list[str]:
        """What a person should know of that config: overrides that it leaves out, and what a run adds."""
        ...

    def standalone(self, spec: Spec, world: int) -> list[Setting]:
        """The config with which it does the same training without xtrain."""
        ...

    def standalone_problems(self, spec: Spec, world: int) -> list[Problem]:
        """What of the spec such a config cannot carry."""
        ...

    def imported(
        self, config: Mapping[str, Any], world: int | None, arguments: Mapping[str, Any] | None
    ) -> Imported:
        """A spec, less what the config cannot know, from a config; SpecError names what is wrong in it.

        `arguments` are Hugging Face's TrainingArguments, for values that the config leaves open.
        """
        ...


def nested(settings: Iterable[Setting]) -> dict[str, JSON]:
    """The config as a tree. A setting with an empty mapping stands for an empty section."""
    tree: Tree = {}
    for setting in settings:
        placed(tree, {setting.key: setting.value})
    return tree


def placed(tree: Tree, values: Mapping[str, Any]) -> None:
    """Put each value at its dotted key; sections that are missing are made."""
    for key, value in values.items():
        *parents, leaf = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value


def translators() -> dict[str, Translator]:
    """Every backend that can be loaded and has a config of its own."""
    from xtrain import registry

    return {name: found for name, found in registry.loadable().items() if isinstance(found, Translator)}


class Elsewhere:
    """A backend asked about a spec for another machine: what this one lacks is not looked at."""

    def __init__(self, backend: Translator) -> None:
        self.name = backend.name
        self.problems = backend.translation_problems


def elsewhere(backend: Backend) -> Judge:
    """Who says what `backend` cannot honour on any machine; most backends do not look at this one anyway."""
    return Elsewhere(backend) if isinstance(backend, Translator) else backend
