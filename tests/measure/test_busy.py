from __future__ import annotations

from time import process_time

import pytest

from xtrain.measure.busy import BusyMeter


class Device:
    """Tells one share after the other, then nothing."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)

    def device_busy(self) -> float | None:
        return self.shares.pop(0) if self.shares else None


def test_the_device_s_share_is_the_mean_of_what_it_told() -> None:
    meter = BusyMeter(Device(0.5, 1.0))
    for _ in range(3):
        meter.look()
    assert meter.read().device == 0.75


@pytest.mark.parametrize("engine", [Device(), object()])
def test_a_device_that_tells_nothing_is_unknown_and_not_idle(engine: object) -> None:
    meter = BusyMeter(engine)
    meter.look()
    assert meter.read().device is None


def test_a_process_that_computes_keeps_about_one_core_busy_and_never_more_than_it_can() -> None:
    """However busy the machine is: it may get less of a core, and then the clock of the core says so."""
    meter = BusyMeter(object())
    until = process_time() + 0.05
    while process_time() < until:
        pass
    cores = meter.read().host_cores
    assert cores is not None
    assert 0 < cores < 1.5
