"""The spec's JSON Schema: for editors, for messages ("expected ..."), and for the table of docs/spec.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, TypeAlias

from xtrain.spec.tree import LARGEST, Spec

Schema: TypeAlias = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
NAMES = {
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("text", "texts"),
    "boolean": ("true or false", "booleans"),
}


@cache
def json_schema() -> Schema:
    """JSON Schema (2020-12) of a spec, short forms included."""
    described = Spec.model_json_schema()
    return {"$schema": DRAFT, **described, "title": "xtrain spec"}


def alternatives(schema: Schema) -> Iterator[Schema]:
    """What a key may hold, one schema for each kind, references followed."""
    if "$ref" in schema:
        yield from alternatives(json_schema()["$defs"][schema["$ref"].rpartition("/")[2]])
    elif "anyOf" in schema or "oneOf" in schema:
        for one in schema.get("anyOf") or schema["oneOf"]:
            yield from alternatives(one)
    else:
        yield schema


def sections(schema: Schema) -> list[Schema]:
    """The alternatives that have keys of their own; more than one where `name` chooses."""
    return [one for one in alternatives(schema) if "properties" in one]


def variant(schema: Schema, value: object) -> Schema | None:
    """The section that `value` is meant to be; None when a key holds no section."""
    found = sections(schema)
    if len(found) <= 1:
        return found[0] if found else None
    given = value.get("name") if isinstance(value, dict) else value
    named = [one for one in found if section_name(one) == given]
    return (
        named[0] if named else next((one for one in found if "name" not in one.get("required", [])), found[0])
    )


def section_name(section: Schema) -> str:
    """What chooses this section among its alternatives."""
    return str(section["properties"].get("name", {}).get("const", ""))


def at(path: Sequence[str], data: object) -> Schema | None:
    """The schema of the key at `path` in `data`; None where the spec has no such key."""
    schema: Schema | None = json_schema()
    for key in path:
        section = variant(schema, data) if schema is not None else None
        schema = section["properties"].get(key) if section is not None else None
        data = data.get(key) if isinstance(data, dict) else None
    return schema


def all_keys() -> dict[str, list[Schema]]:
    """Every dotted key with the schemas that it has in the alternatives of its section."""
    found: dict[str, list[Schema]] = {}
    _collect(json_schema(), "", found)
    return found


def _collect(schema: Schema, prefix: str, found: dict[str, list[Schema]]) -> None:
    for section in sections(schema):
        for key, below in section["properties"].items():
            found.setdefault(prefix + key, []).append(below)
            _collect(below, f"{prefix}{key}.", found)


# --- in words ----------------------------------------------------------------------------------


def choices(schema: Schema) -> list[str]:
    """The words that a key takes, those of its variants included."""
    found: list[str] = []
    for one in alternatives(schema):
        found += one.get("enum", [one["const"]] if "const" in one else [])
    return list(dict.fromkeys(found))


def describe(schema: Schema) -> str:
    """What a key takes, in words: "a whole number >= 1", "none, auto or a section with every, ..."."""
    kinds = [one for one in alternatives(schema) if "enum" not in one and "const" not in one]
    optional = "default" in schema and schema["default"] is None
    null = [one for one in kinds if one.get("type") == "null"]
    said = [_kind(one) for one in kinds if one not in null and "properties" not in one]
    words = choices(schema) + said + _section(sections(schema))
    return join_or(words + (["null"] if null and not optional else []))


def join_or(words: Sequence[str]) -> str:
    """a, b or c"""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _kind(schema: Schema) -> str:
    kind = schema.get("type", "object")
    if kind == "array":
        items = schema.get("items") or next(iter(schema.get("prefixItems", [])), None)
        if not items:
            return "a list"
        count = f"{schema['maxItems']} " if "maxItems" in schema else ""
        inner = join_or(choices(items)) if choices(items) else NAMES[items["type"]][1] + _bounds(items)
        return f"a list of {count}{inner}"
    return NAMES[kind][0] + _bounds(schema) if kind in NAMES else "a mapping"


def _bounds(schema: Schema) -> str:
    limits = [
        f"{sign} {schema[key]:g}"
        for key, sign in BOUNDS.items()
        if key in schema and schema[key] != LARGEST  # said only to who goes beyond
    ]
    return f" {' and '.join(limits)}" if limits else ""


def _section(found: Sequence[Schema]) -> list[str]:
    """`a section with ...`: what it must have, or else what it may."""
    if not found:
        return []
    keys = list(found[0].get("required", []) or found[0]["properties"])
    shown = keys if len(keys) <= 5 else [*keys[:4], "..."]
    return [f"a section with {', '.join(shown)}"]


# --- the table of docs/spec.md -----------------------------------------------------------------


def key_table() -> str:
    """Every key, what it takes, its default and its meaning, as a Markdown table."""
    rows = ["| key | takes | default | |", "|---|---|---|---|"]
    for key, found in all_keys().items():
        takes = _unique(describe(one).replace("|", "\\|") for one in found if not sections(one))
        takes = takes or _unique(join_or([*choices(one), "a section"]) for one in found)
        default = _unique(_default(one) for one in found)
        default = default.replace("required; ", "").replace(
            "; required", ""
        )  # `name`: one form has it as default
        meaning = _unique(one.get("description", "") for one in found)
        rows.append(f"| `{key}` | {takes} | {default} | {meaning} |")
    return "\n".join(rows) + "\n"


def _unique(words: Iterator[str]) -> str:
    """Alternatives that differ, once each."""
    return "; ".join(word for word in dict.fromkeys(words) if word)


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return "required"
    default = schema["default"]
    if sections(schema) or default is None or default == {}:
        return ""
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"
