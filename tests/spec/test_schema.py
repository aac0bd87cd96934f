"""The JSON Schema agrees with the reader, explains every key, and is what docs/spec.md shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from xtrain.cli import main
from xtrain.spec.keys import all_keys as all_leaves
from xtrain.spec.reader import read_file
from xtrain.spec.schema import all_keys, json_schema, key_table
from xtrain.spec.tree import Spec

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
GOOD: dict[str, Any] = {
    "model": {"preset": "gpt2-nano"},
    "data": {"source": "stdlib"},
    "batch": {"global": 16},
    "train": {"steps": 200},
    "optimizer": {"lr": 3e-4},
}


def schema_accepts(spec: object) -> bool:
    return bool(jsonschema.Draft202012Validator(json_schema()).is_valid(spec))


def reader_accepts(spec: object) -> bool:
    try:
        Spec.model_validate(spec)
    except ValidationError:
        return False
    return True


def test_schema_is_a_valid_one_and_alone_on_standard_output() -> None:
    result = CliRunner().invoke(main, ["schema"])
    printed = json.loads(result.stdout)
    assert printed == json_schema()
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(printed)


def test_shipped_specs_were_found() -> None:
    assert ROOT / "configs" / "quickstart.yaml" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_spec_fits_the_schema(path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    assert [error.message for error in validator.iter_errors(read_file(path).data)] == []


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "bf16"},
        {"precision": {"dtype": "fp16", "loss_scale": 0}},
        {"memory": "auto"},
        {"memory": {"checkpointing": "none", "offload": {"optimizer": "cpu"}}},
        {"memory": {"offload": {"optimizer": {"device": "nvme", "path": "/x"}}, "loss_chunk": 64}},
        {"memory": {"checkpointing": {"selective": {"ops": "cheap"}}, "loss_chunk": "none"}},
        {"schedule": "constant"},
        {"schedule": {"warmup": 3}},
        {"schedule": {"name": "wsd", "stable": 1, "decay": 1}},
        {"optimizer": {"name": "sgd", "lr": 1, "momentum": 0.9}},
        {"manual": {"devices": ["main", "cpu"], "split": [0.5, 0.5]}},
        {"stability": None, "deepspeed": {"anything": [1]}},
    ],
    ids=str,
)
def test_schema_and_reader_accept(changes: dict[str, Any]) -> None:
    assert (schema_accepts({**GOOD, **changes}), reader_accepts({**GOOD, **changes})) == (True, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"trian": {}},
        {"train": {"steps": 0}},
        {"train": {"steps": "200"}},
        {"train": {"steps": 20.5}},
        {"train": {}},
        {"batch": {"global_": 16}},
        {"optimizer": {"lr": "3e-4"}},
        {"optimizer": {"lr": 0}},
        {"optimizer": {"name": "sgd", "lr": 1, "eps": 1}},
        {"optimizer": {"lr": 1, "betas": [0.9]}},
        {"schedule": "wsd"},
        {"precision": "fp8"},
        {"memory": "fast"},
        {"memory": {"offload": {"optimizer": "disk"}}},
        {"log": {"trackers": "wandb"}},
    ],
    ids=str,
)
def test_schema_and_reader_refuse(changes: dict[str, Any]) -> None:
    assert (schema_accepts({**GOOD, **changes}), reader_accepts({**GOOD, **changes})) == (False, False)


def test_every_key_is_explained() -> None:
    assert [
        key for key, found in all_keys().items() if not all(one.get("description") for one in found)
    ] == []


def test_schema_has_every_key_of_the_tree() -> None:
    assert set(all_leaves()) <= set(all_keys())


def test_table_of_the_documentation_is_current() -> None:
    """When it is not: print key_table() and put it below the comment in docs/spec.md."""
    page = (ROOT / "docs" / "spec.md").read_text()
    assert page.partition("-->\n\n")[2] == key_table()
