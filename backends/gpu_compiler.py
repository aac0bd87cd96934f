"""What torch.compile makes code for GPUs with, as far as that can be told without torch."""

from __future__ import annotations

from xtrain.measure.machine import package_version

MODULE = "triton"
"""NVIDIA's and AMD's GPUs alike; torch's builds for them require it."""


def compiler_modules(on_gpu: bool) -> tuple[str, ...]:
    """What must be there to compile for a GPU; a torch built for the CPU alone does not see one."""
    return (MODULE,) if on_gpu and not (package_version("torch") or "").endswith("+cpu") else ()
