"""One memory, two views: a tensor of the simulated device and a tensor of the CPU over the same bytes."""

from __future__ import annotations

import ctypes

import torch
from torch._C import _to_dlpack as to_dlpack
from torch.utils.dlpack import from_dlpack

from tests.simulated.counting import MEMORY, NAME

_DLPACK_CPU = 1
_DLPACK_EXTENSION = 12
"""What DLPack calls a device that it does not know; torch's PrivateUse1."""
_DEVICE_OFFSET = ctypes.sizeof(ctypes.c_void_p)
"""A DLTensor begins with its data pointer; then come the device's type and index, 32 bits each."""

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]

UNSUPPORTED = (torch.float64, torch.complex128)


def is_simulated(tensor: torch.Tensor) -> bool:
    return tensor.device.type == NAME


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The CPU's view of a simulated tensor. For kernels only: to everyone else it is a copy away."""
    return _seen_as(tensor, _DLPACK_CPU, 0)


def on_device(tensor: torch.Tensor, index: int) -> torch.Tensor:
    """A fresh CPU tensor as one of device `index`, which counts its bytes from here on."""
    refuse_float64(tensor.dtype)
    seen = _seen_as(tensor, _DLPACK_EXTENSION, index)
    MEMORY[index].hold(seen.untyped_storage())
    return seen


def refuse_float64(dtype: torch.dtype | None) -> None:
    if dtype in UNSUPPORTED:
        raise TypeError(f"the simulated device has no {dtype}; use float32, or keep the tensor on the CPU")


def _seen_as(tensor: torch.Tensor, device_type: int, index: int) -> torch.Tensor:
    """The same memory, kept alive by both; only the device written on it differs."""
    capsule = to_dlpack(tensor)
    address = _capsule_pointer(capsule, b"dltensor")
    device = (ctypes.c_int32 * 2).from_address(address + _DEVICE_OFFSET)
    device[0], device[1] = device_type, index
    return from_dlpack(capsule)
