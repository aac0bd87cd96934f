"""`--set KEY=YAML`: one key of a spec given on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from xtrain.contract import Problem
from xtrain.spec.problems import shown
from xtrain.spec.reader import Unreadable, parse

SHORT_FORMS = {"optimizer": "name", "schedule": "name", "precision": "dtype"}
"""The key that a word stands for, where a section may be one word; also of every memory.offload.*."""


@dataclass
class Overrides:
    """What the overrides changed, so that a problem can be told to come from one of them."""

    origins: dict[str, str] = field(default_factory=dict)
    """Dotted key -> the override that made it, as it was typed."""
    problems: list[Problem] = field(default_factory=list)

    def apply(self, data: dict[str, Any], overrides: Sequence[str]) -> None:
        """Change `data` in place; what cannot be applied becomes a problem."""
        for override in overrides:
            self._apply_one(data, override)

    def origin(self, key: str) -> str:
        """The override that `key` comes from; empty when it comes from the file."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, "")

    def _apply_one(self, data: dict[str, Any], override: str) -> None:
        key, equals, text = override.partition("=")
        parts, origin = key.strip().split("."), f"--set {override}"
        if not equals or not text.strip() or not all(parts):
            self._refuse(origin, Problem("", "", "expected KEY=VALUE", "such as train.steps=20"))
            return
        try:
            document = parse(text)
        except Unreadable as error:
            self._refuse(origin, replace(error.problem, path=key))
            return
        for problem in document.problems:
            self._refuse(origin, replace(problem, path=f"{key}.{problem.path}".rstrip(".")))
        if not document.problems and (section := self._section(data, parts[:-1], origin)) is not None:
            section[parts[-1]] = document.data
            self._note(".".join(parts), origin)

    def _section(self, data: dict[str, Any], parents: Sequence[str], origin: str) -> dict[str, Any] | None:
        """The section that the key belongs to, made where there is none."""
        for depth, name in enumerate(parents, 1):
            path, value = ".".join(parents[:depth]), data.get(name)
            short = "device" if path.startswith("memory.offload.") else SHORT_FORMS.get(path)
            if value is None:
                self._note(path, origin)
                data[name] = {}
            elif isinstance(value, str) and short:
                data[name] = {short: value}
            elif not isinstance(value, dict):
                whole = f"set {path} as a whole"
                self._refuse(origin, Problem(path, shown(value), "expected a section", whole))
                return None
            data = data[name]
        return data

    def _note(self, path: str, origin: str) -> None:
        """`path` is this override's now, and everything below it."""
        self.origins = {key: by for key, by in self.origins.items() if not key.startswith(f"{path}.")}
        self.origins[path] = origin

    def _refuse(self, origin: str, problem: Problem) -> None:
        self.problems.append(replace(problem, origin=origin, line=None, column=None))
