"""ds_config -> spec."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.translation import Imported


def import_config(config: Mapping[str, Any], world: int) -> Imported:
    raise NotImplementedError
