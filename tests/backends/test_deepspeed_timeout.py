"""Reductions wait longer than the watchdog, which can say where a run stood."""

from __future__ import annotations

import importlib
from datetime import timedelta

import pytest

collective_timeout = importlib.import_module("xtrain.backends.deepspeed.environment").collective_timeout


@pytest.mark.parametrize("minutes", [0.5, 30.0, 26.0, 120.0, 10_000.0])
def test_a_reduction_waits_longer_than_the_watchdog(minutes: float) -> None:
    assert collective_timeout(minutes) > timedelta(minutes=minutes)


def test_loading_has_half_an_hour_however_short_a_step_may_be() -> None:
    assert collective_timeout(0.5) == timedelta(minutes=30)


def test_without_a_limit_a_reduction_has_practically_none() -> None:
    assert collective_timeout(None) >= timedelta(days=365)
