"""The hand-written engine on the simulated device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simulated.backend import simulated_backend
from xtrain.contract import Backend


@pytest.fixture
def simulated() -> Iterator[Backend]:
    with simulated_backend() as backend:
        yield backend
