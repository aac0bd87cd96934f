"""Turns pydantic's errors into problems that speak of the file: one for each key, in the spec's words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeAlias

from pydantic import ValidationError

from xtrain.contract import JSON, Problem
from xtrain.spec.reader import as_scalar
from xtrain.spec.schema import Schema, all_keys, alternatives, at, choices, describe, join_or, section_name
from xtrain.spec.schema import sections as sections_of
from xtrain.spec.tree import LARGEST, STAGES, Spec

Path: TypeAlias = tuple[str, ...]

UNKNOWN = "extra_forbidden"
"""pydantic's name for a key that is not known."""
OTHER_NAMES = {
    "learning_rate": "optimizer.lr",
    "batch_size": "batch.micro",
    "micro_batch": "batch.micro",
    "global_batch": "batch.global",
    "max_steps": "train.steps",
    "epochs": "train.steps",
    "warmup_steps": "schedule.warmup",
    "max_grad_norm": "train.clip",
    "grad_clip": "train.clip",
    "gradient_clipping": "train.clip",
    "block_size": "data.seq_len",
    "max_length": "data.seq_len",
    "n_layer": "model.layers",
    "n_head": "model.heads",
    "n_embd": "model.hidden",
    "bf16": "precision",
    "fp16": "precision",
    "dtype": "precision.dtype",
    "zero_optimization": "memory.sharding",
    "zero_stage": "memory.sharding",
    "gradient_checkpointing": "memory.checkpointing",
    "optimizer_in_bwd": "memory.optimizer_in_backward",
    "nproc": "launch.processes",
}
"""What the field calls things."""
OTHER_WORDS = {
    "memory.sharding": {
        f"{before}{stage}": word
        for stage, word in enumerate(STAGES)
        for before in ("", "zero", "zero-", "zero_", "stage", "stage-", "stage_")
    }
}
"""And what it calls the values of a key."""
DERIVED = {"accumulation", "accumulate", "gradient_accumulation", "gradient_accumulation_steps", "grad_accum"}
MEANS_TRUE, MEANS_FALSE = {"yes", "on", "y"}, {"no", "off", "n"}
SHOWN_CHARACTERS = 60


def find_faults(data: JSON) -> dict[Path, str]:
    """Each key that is wrong in `data`, with pydantic's name for the kind of fault."""
    try:
        Spec.model_validate(data)
    except ValidationError as error:
        return _faults(error, data)
    return {}


def translate(faults: Mapping[Path, str], data: JSON) -> list[Problem]:
    """One problem for each of the faults of `data`."""
    return [_problem(path, kind, data) for path, kind in faults.items()]


def could_mean(path: Path, data: JSON) -> list[str]:
    """The keys, dotted, that an unknown key may have been meant to be; empty where it is like none."""
    key = path[-1]
    if key in OTHER_NAMES:
        return [OTHER_NAMES[key]]
    if meant := _meant(path, data):
        return [".".join(meant)]
    return [other for other in all_keys() if other.rpartition(".")[2] == key]


def shown(value: object) -> str:
    """A value for a message: text in quotes, the rest as in YAML, cut short."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 4]} ..."


def _faults(error: ValidationError, data: JSON) -> dict[Path, str]:
    kinds: dict[Path, str] = {}
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        kinds.setdefault(_path_in(one["loc"], data, one["type"]), one["type"])
    meant = {_meant(path, data) for path, kind in kinds.items() if kind == UNKNOWN}
    # a section that fits none of its forms is told by the keys that are wrong in it, a mistyped key once
    hidden = {path for path in kinds if any(_below(other, path) for other in kinds)} | meant
    return {path: kind for path, kind in kinds.items() if path not in hidden}


def _path_in(loc: Sequence[str | int], data: JSON, kind: str) -> Path:
    """pydantic's place as a path in the file: without the names of alternatives, and not into lists."""
    path: list[str] = []
    value: Any = data
    for part in loc:
        if isinstance(value, dict) and part in value:
            path.append(str(part))
            value = value[part]
    if kind == "missing" and not isinstance(value, list):
        path.append(str(loc[-1]))
    if kind == "union_tag_invalid" and isinstance(value, dict):
        path.append("name")
    return tuple(path)


def _below(path: Path, above: Path) -> bool:
    return len(path) > len(above) and path[: len(above)] == above


def _problem(path: Path, kind: str, data: JSON) -> Problem:
    key = ".".join(path)
    if kind == UNKNOWN:
        return Problem(key, "", "unknown key", _nearest_key(path, data))
    schema = at(path, data) or {}
    if kind == "missing" and not _is_there(path, data):
        return Problem(key, "", f"missing, expected {describe(schema)}")
    value = _value_at(path, data)
    words = _names(path, data) if kind == "union_tag_invalid" else []
    expected = join_or(words) if words else describe(schema)
    known = OTHER_WORDS.get(key, {}).get(str(value).lower())
    nearest = f"did you mean {known!r}?" if known else _nearest_value(value, schema, words)
    return Problem(key, shown(value), f"expected {expected}", nearest)


def _names(path: Path, data: JSON) -> list[str]:
    """The names that choose between a section's forms; `path` is the section or its `name`."""
    section = path[:-1] if path[-1] == "name" else path
    return [section_name(one) for one in sections_of(at(section, data) or {})]


def _is_there(path: Path, data: JSON) -> bool:
    for key in path:
        if not isinstance(data, dict) or key not in data:
            return False
        data = data[key]
    return True


def _value_at(path: Sequence[str], data: JSON) -> JSON:
    for key in path:
        assert isinstance(data, dict)
        data = data[key]
    return data


# --- the nearest thing that works ---------------------------------------------------------------


def _nearest_key(path: Path, data: JSON) -> str:
    """The key that was probably meant: of another form of the section, beside it, or in another section."""
    *parents, key = path
    section = at(parents, data) or {}
    forms = [section_name(one) for one in sections_of(section) if key in one["properties"]]
    if forms:
        return f"it belongs to {'.'.join(parents)} {join_or(forms)}"
    if key in DERIVED:
        return "it follows from batch.global, batch.micro and the number of processes"
    if meant := could_mean(path, data):
        here = "".join(f"{parent}." for parent in parents)
        return f"did you mean {join_or([repr(other.removeprefix(here)) for other in meant])}?"
    return f"known here: {', '.join(_keys_of(parents, data))}"


def _meant(path: Path, data: JSON) -> Path:
    """The key beside it that `path` is a mistyping of; empty where there is none."""
    *parents, key = path
    near = get_close_matches(key, _keys_of(parents, data), 1)
    return (*parents, near[0]) if near else ()


def _keys_of(path: Sequence[str], data: JSON) -> list[str]:
    """The keys that the section at `path` may have, given the form that it has."""
    prefix = ".".join(path) + "." if path else ""
    below = [key.removeprefix(prefix) for key in all_keys() if key.startswith(prefix)]
    return [key for key in below if "." not in key and at([*path, key], data) is not None]


def _nearest_value(value: JSON, schema: Schema, words: Sequence[str]) -> str:
    """Advice for a value of the wrong kind; empty where `expected` says it all."""
    kinds = {one.get("type") for one in alternatives(schema)}
    advice = next(_advice(value, words or choices(schema), kinds), "")
    return advice or ("leave it out" if value is None and "default" in schema else "")


def _advice(value: JSON, words: Sequence[str], kinds: set[Any]) -> Iterator[str]:
    means_yes_or_no = isinstance(value, str) and value.lower() in MEANS_TRUE | MEANS_FALSE
    if isinstance(value, str):
        if means_yes_or_no and "boolean" in kinds:
            yield f"write {'true' if value.lower() in MEANS_TRUE else 'false'}"
        if not means_yes_or_no and (near := get_close_matches(value.lower(), words, 1)):
            yield f"did you mean {near[0]!r}?"
        unquoted = as_scalar(value)
        is_number = isinstance(unquoted, int | float) and not isinstance(unquoted, bool)
        if (is_number and kinds & {"integer", "number"}) or (
            isinstance(unquoted, bool) and "boolean" in kinds
        ):
            yield "remove the quotes"
    if isinstance(value, float) and "integer" in kinds and value.is_integer() and value > 0:
        yield f"write {int(value)}"
    if isinstance(value, int) and "integer" in kinds and value > LARGEST:
        yield "keep it below 2^63"
    no = value is None or value is False or (means_yes_or_no and value in MEANS_FALSE)
    if no and "none" in words:
        yield "did you mean 'none'?"
