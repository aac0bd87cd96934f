"""The table spec <-> ds_config is whole, says what the translation does, and stands in the documentation."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from backends.deepspeed.mapping import MAPPING, table
from backends.deepspeed.support import REFUSED
from tests.backends.test_every_key import SET, changed
from xtrain.spec.keys import all_keys, covering
from xtrain.translate import find_translator
from xtrain.translation import Setting

PAGE = Path(__file__).parents[2] / "docs" / "deepspeed.md"


def nearest_row(key: str) -> str | None:
    """The row that `key` has, or the one of the section that it is in."""
    while key and key not in MAPPING:
        key = key.rpartition(".")[0]
    return key or None


@cache
def said() -> set[tuple[str, str]]:
    """(spec key, ds_config key) for every setting of specs that together set every key."""
    translator = find_translator(None)
    found: list[Setting] = []
    for key in SET:
        spec = changed(key)
        world = spec.launch.processes
        found += [*translator.translation(spec, world), *translator.standalone(spec, world)]
    pairs = {(spec_key, setting.key) for setting in found for spec_key in setting.spec_keys}
    return {(s, k) for s, k in pairs if not s.startswith("deepspeed.")}


def related(spec_key: str, row: str) -> bool:
    """Whether one is the other, or a section that the other is in."""
    return bool(covering(spec_key, [row]) or covering(row, [spec_key]))


@pytest.mark.parametrize("key", all_keys())
def test_every_key_of_the_spec_is_in_the_table_or_refused(key: str) -> None:
    assert nearest_row(key) is not None or covering(key, REFUSED) is not None


def test_no_row_is_about_a_key_that_does_not_exist() -> None:
    keys = all_keys()
    assert [row for row in MAPPING if not any(covering(key, [row]) for key in keys)] == []


def test_what_the_translation_says_is_in_the_table() -> None:
    for spec_key, ds_key in said():
        rows = [keys for row, (keys, _) in MAPPING.items() if related(spec_key, row)]
        assert ds_key in {key.strip("[]") for keys in rows for key in keys}, (spec_key, ds_key)


def test_what_is_in_the_table_the_translation_says() -> None:
    for row, (keys, _) in MAPPING.items():
        for ds_key in (key.strip("[]") for key in keys if " " not in key):
            assert any(key == ds_key and related(spec_key, row) for spec_key, key in said()), (row, ds_key)


def test_the_table_of_the_documentation_is_current() -> None:
    """When it is not: print backends.deepspeed.mapping.table() and put it below the comment."""
    assert table() in PAGE.read_text()
