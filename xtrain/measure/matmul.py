"""What a large matrix product reaches on a device: what MFU is held against.

Measured once, at the end of a run that is long enough for it not to matter; the record keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from xtrain.records.record import MatmulFacts

if TYPE_CHECKING:
    import torch

    from xtrain.contract import Engine

BUDGET_SECONDS = 0.2
LONG_RUN_SECONDS = 10.0
"""Shorter runs do not measure it: it would be more than 2% of them."""
SMALLEST, LARGEST = 256, 8192
"""Rows of the square matrices: from this size on, until a product takes long enough to be timed well."""
LONG_PRODUCT_SECONDS = 0.01
PRODUCTS = 4
"""One after another between two readings of the clock."""


@dataclass(frozen=True)
class MatmulPeak:
    """Of one process's device."""

    dtype: str
    flops_per_second: float
    datasheet: float | None
    """What the vendor promises for the dtype; None where it is not known."""


@runtime_checkable
class Measurable(Protocol):
    """An engine that can time a matrix product on its own device, in the dtype that it computes in."""

    def matmul_peak(self) -> MatmulPeak | None:
        """Local. None where the device is too full for it."""
        ...


def gather_matmul(engine: Engine, seconds: float) -> MatmulFacts | None:
    """Of all processes together, after a run of `seconds`. Collective.

    None where the run was too short or a process could not tell.
    """
    long_enough = seconds >= LONG_RUN_SECONDS and isinstance(engine, Measurable)
    peak = engine.matmul_peak() if long_enough and isinstance(engine, Measurable) else None
    gathered = engine.gather(peak.flops_per_second if peak else None)
    rates = [rate for rate in gathered if isinstance(rate, float)]
    if peak is None or len(rates) < len(gathered):
        return None
    datasheet = peak.datasheet * len(rates) if peak.datasheet else None
    return MatmulFacts(dtype=peak.dtype, flops_per_second=sum(rates), datasheet=datasheet)


def matmul_flops(
    device: torch.device,
    dtype: torch.dtype,
    synchronize: Callable[[], None],
    budget_seconds: float = BUDGET_SECONDS,
) -> float | None:
    """The most operations per second that a square product reaches within the budget; 2 n^3 each.

    None where not even the smallest fits.
    """
    best, size, started = 0.0, SMALLEST, perf_counter()
    while True:
        try:
            seconds = _product_seconds(device, dtype, synchronize, size)
        except RuntimeError:  # the device is full, or nearly: what was seen stands
            break
        best = max(best, 2.0 * size**3 / seconds)
        if seconds < LONG_PRODUCT_SECONDS and size < LARGEST:
            size *= 2
        if perf_counter() - started >= budget_seconds:
            break
    return best or None


def _product_seconds(
    device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None], size: int
) -> float:
    import torch

    # not constant: a GPU that flips fewer bits draws less power and clocks higher than in training
    wave = torch.arange(size, device=device).float().sin().to(dtype)
    left = right = wave[:, None] * wave.flip(0)[None, :]
    out = torch.empty_like(left)
    synchronize()
    began = perf_counter()
    for _ in range(PRODUCTS):
        torch.mm(left, right, out=out)
    synchronize()
    return (perf_counter() - began) / PRODUCTS
