"""A ds_config's values by dotted key, taken one by one, so that what nobody took can be listed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from xtrain.spec.keys import covering
from xtrain.spec.problems import shown

from .known_keys import KNOWN, REMOVED


class Leaves:
    """What is left of a ds_config, and what was decided on the way."""

    def __init__(self, flat: dict[str, Any], chosen: dict[str, str]) -> None:
        self._flat = flat
        self.chosen = chosen
        """Spec key -> why it has its value, where the config did not simply say so."""
        self.left_out: list[str] = []

    def take(self, key: str, default: Any) -> Any:
        """The value, which is then spoken for; `default` where there is none, or null."""
        value = self._flat.pop(key, None)
        return default if value is None else value

    def get(self, key: str, default: Any) -> Any:
        return self._flat.get(key, default)

    def give(self, key: str, value: Any) -> None:
        """As if the config had said so, where it does not say otherwise."""
        self._flat.setdefault(key, value)

    def drop(self, prefix: str, why: str) -> None:
        """Forget every key that begins so; those that ask for something are listed."""
        for key in [key for key in self._flat if key.startswith(prefix)]:
            value = self._flat.pop(key)
            if not says_nothing(key, value):
                self.left_out.append(f"{key}: {shown(value)}: {why}")

    def say(self, spec_key: str, why: str) -> None:
        self.chosen[spec_key] = why

    def remaining(self) -> Iterator[tuple[str, Any]]:
        yield from self._flat.items()


def says_nothing(key: str, value: Any) -> bool:
    """Whether DeepSpeed would do the same without it: its default, or something that is off."""
    if key not in KNOWN and covering(key, REMOVED) is None:
        return False
    schema = KNOWN.get(key, {})
    off: tuple[Any, ...] = (None, schema["default"]) if "default" in schema else (None, False, "none", {}, [])
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in off)
