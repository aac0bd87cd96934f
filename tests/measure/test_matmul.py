from __future__ import annotations

from typing import Any

import pytest
import torch

from backends.null.backend import NullEngine
from backends.yardstick import promised_flops
from xtrain.measure.matmul import LONG_RUN_SECONDS, MatmulPeak, gather_matmul, matmul_flops

CPU = torch.device("cpu")


class Pair(NullEngine):
    """One of two processes; the other one found `other`."""

    def __init__(self, own: MatmulPeak | None, other: float | None) -> None:
        self.own, self.other = own, other

    def matmul_peak(self) -> MatmulPeak | None:
        return self.own

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_a_product_is_timed_in_the_dtype_that_is_asked_for() -> None:
    """Any machine reaches some million operations a second, and none an exaflop in one process."""
    for dtype in (torch.float32, torch.bfloat16):
        found = matmul_flops(CPU, dtype, lambda: None, budget_seconds=0.01)
        assert found is not None
        assert 1e6 < found < 1e18


def test_the_device_is_waited_for_at_both_ends() -> None:
    waits: list[int] = []
    matmul_flops(CPU, torch.float32, lambda: waits.append(1), budget_seconds=0)
    assert len(waits) == 2


def test_a_device_without_room_gives_no_figure() -> None:
    def full() -> None:
        raise RuntimeError("out of memory")

    assert matmul_flops(CPU, torch.float32, full, budget_seconds=0.01) is None


def test_processes_are_added_up() -> None:
    found = gather_matmul(Pair(MatmulPeak("bf16", 3e12, 5e12), 4e12), LONG_RUN_SECONDS)
    assert found is not None
    assert (found.dtype, found.flops_per_second, found.datasheet) == ("bf16", 7e12, 10e12)


@pytest.mark.parametrize(
    ("engine", "seconds"),
    [
        (Pair(MatmulPeak("fp32", 3e12, None), None), LONG_RUN_SECONDS),
        (Pair(None, 3e12), LONG_RUN_SECONDS),
        (Pair(MatmulPeak("fp32", 3e12, None), 3e12), LONG_RUN_SECONDS / 2),
        (NullEngine(), LONG_RUN_SECONDS),
    ],
)
def test_what_not_every_process_could_measure_is_not_measured(engine: Any, seconds: float) -> None:
    assert gather_matmul(engine, seconds) is None


@pytest.mark.parametrize(
    ("name", "dtype", "promised"),
    [
        ("NVIDIA A100 SXM4 40GB", "bf16", 312e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 67e12),
        ("NVIDIA L40S", "fp16", 362e12),
        ("Tesla V100 SXM2 16GB", "bf16", None),
        ("Something of tomorrow", "fp32", None),
    ],
)
def test_the_data_sheet_is_that_of_the_device(name: str, dtype: str, promised: float | None) -> None:
    assert promised_flops(name, dtype) == promised
