"""How much a device can do, measured and as vendors promise it in their data sheets; and how much it does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from xtrain.measure.matmul import MatmulPeak, matmul_flops

from .dtypes import DTYPES

PROMISED = {
    "H200": {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12},
    "H100 PCIe": {"fp32": 51e12, "bf16": 756e12, "fp16": 756e12},
    "H100": {"fp32": 67e12, "bf16": 989e12, "fp16": 989e12},
    "A100": {"fp32": 19.5e12, "bf16": 312e12, "fp16": 312e12},
    "L40S": {"fp32": 91.6e12, "bf16": 362e12, "fp16": 362e12},
    "L4": {"fp32": 30.3e12, "bf16": 121e12, "fp16": 121e12},
    "A10": {"fp32": 31.2e12, "bf16": 125e12, "fp16": 125e12},
    "V100": {"fp32": 15.7e12, "fp16": 125e12},
    "T4": {"fp32": 8.1e12, "fp16": 65e12},
}
"""Operations per second by what a device's name contains, the more telling names first; fp32 without TF32."""


def matmul_peak(device: torch.device, dtype: str, synchronize: Callable[[], None]) -> MatmulPeak | None:
    """For "fp32", "bf16" or "fp16"; None where the device is too full for it."""
    reached = matmul_flops(device, DTYPES[dtype], synchronize)
    return MatmulPeak(dtype, reached, datasheet_flops(device, dtype)) if reached else None


def datasheet_flops(device: torch.device, dtype: str) -> float | None:
    """Of the device, for "fp32", "bf16" or "fp16"; None where it is not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).replace("-", " ")
    return promised_flops(words, dtype)


def device_busy(device: torch.device) -> float | None:
    """Share of the last sixth of a second to second in which a kernel ran, as the vendor's library counts it.

    None without that library (nvidia-ml-py), and on devices that have none.
    """
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except Exception:  # its errors are classes of a library that may be missing
        return None


def promised_flops(device_name: str, dtype: str) -> float | None:
    """ "NVIDIA A100 SXM4 40GB", "bf16" -> 312e12."""
    padded = f" {device_name} "
    found = next((rates for name, rates in PROMISED.items() if f" {name} " in padded), {})
    return found.get(dtype)
