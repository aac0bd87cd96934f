"""Which keys a spec sets, so that a backend can honour or refuse each one by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import BaseModel

from xtrain.spec.tree import Spec


def changed_keys(spec: Spec) -> dict[str, object]:
    """Dotted key -> value, for every key whose value is not its default."""
    return dict(_changed(spec, ""))


def all_keys() -> list[str]:
    """Every dotted key that a spec may have, those of all optimizers and schedules together."""
    return sorted(set(_all(Spec, "")))


def covering(key: str, table: Iterable[str]) -> str | None:
    """The entry of `table` that `key` is, or lies below."""
    return next((entry for entry in table if key == entry or key.startswith(f"{entry}.")), None)


def printed(value: object) -> str:
    """A value as it stands in a YAML file."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _changed(section: BaseModel, prefix: str) -> Iterator[tuple[str, object]]:
    for name, field in type(section).model_fields.items():
        key, value = prefix + (field.alias or name), getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _changed(value, f"{key}.")
        elif field.is_required() or value != field.get_default(call_default_factory=True):
            yield key, value


def _all(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        below = list(_sections(field.annotation))
        for one in below:
            yield from _all(one, f"{key}.")
        if not below:
            yield key


def _sections(annotation: object) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections(argument)
