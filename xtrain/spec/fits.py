"""Whether a value is of the kind that a simple JSON Schema asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.spec.tree import LARGEST


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Types, bounds, `enum` and `anyOf`; 5e8 passes for a whole number."""
    if "anyOf" in schema:
        return any(fits(value, one) for one in schema["anyOf"])
    if "enum" in schema:
        return not isinstance(value, bool | list | dict) and value in schema["enum"]
    if not _is_a(value, schema.get("type", "any")):
        return False
    if isinstance(value, list):
        count = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return count and all(fits(one, schema.get("items", {})) for one in value)
    if not is_number(value):
        return True
    above = "exclusiveMinimum" not in schema or value > schema["exclusiveMinimum"]
    return bool(above and schema.get("minimum", value) <= value <= schema.get("maximum", value))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_a(value: Any, kind: str) -> bool:
    match kind:
        case "integer":
            return (
                is_number(value) and abs(value) <= LARGEST and (isinstance(value, int) or value.is_integer())
            )
        case "number":
            return is_number(value)
        case "any":
            return True
    python = {"boolean": bool, "string": str, "array": list, "object": dict, "null": type(None)}
    return isinstance(value, python[kind])
