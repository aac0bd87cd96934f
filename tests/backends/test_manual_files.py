"""The map of the hand-written engine's files, for those who come to read it."""

from __future__ import annotations

import re
from pathlib import Path

import backends.manual


def test_the_map_names_every_file_and_no_other() -> None:
    named = re.findall(r"^ *(\w+\.py) ", backends.manual.__doc__ or "", re.MULTILINE)
    folder = Path(backends.manual.__file__ or "").parent
    assert sorted(named) == sorted(file.name for file in folder.glob("*.py") if file.name != "__init__.py")
