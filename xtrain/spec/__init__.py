"""The spec: read, checked, complete. Every problem of a file is reported at once."""

from __future__ import annotations

import json

from pydantic import JsonValue

from xtrain.spec.load import load_spec, locate, spec_text
from xtrain.spec.tree import Spec

__all__ = ["Spec", "dump_spec", "load_spec", "locate", "spec_text"]


def dump_spec(spec: Spec) -> dict[str, JsonValue]:
    """Every key of `spec` under the name it has in a file, defaults included, as JSON.

    Spec.model_validate takes it back.
    """
    # Through text, so that what people put under `args` (dates, infinities) becomes plain JSON.
    complete: dict[str, JsonValue] = json.loads(spec.model_dump_json(by_alias=True))
    return complete
