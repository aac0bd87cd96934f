"""Initial weights as a function of (seed, parameter name).

Drawn on the CPU in fp32, every parameter from a counter-based generator of its own, keyed by both:
the same on every engine, device, sharding stage and platform, whatever the order of construction.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

STD = 0.02
"""GPT-2's standard deviation; residual projections get 1 / sqrt(2 x layers) of it (GPT-2 paper, 2.3)."""


def initialise(model: nn.Module, seed: int, layers: int) -> None:
    """Set every parameter of a built-in model in place, as many at once as torch has threads.

    The parameters are fp32 and on the CPU.
    """
    named = list(model.named_parameters())

    def draw(name: str, parameter: nn.Parameter) -> None:
        _fill(parameter.detach().numpy(), name, seed, layers)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for drawn in [threads.submit(draw, *one) for one in named]:
            drawn.result()


def initial_weight(name: str, shape: tuple[int, ...], seed: int, layers: int) -> torch.Tensor:
    """The fp32 starting value of one parameter of a built-in model with that many layers."""
    drawn = np.empty(shape, np.float32)
    _fill(drawn, name, seed, layers)
    return torch.from_numpy(drawn)


def _fill(target: NDArray[np.float32], name: str, seed: int, layers: int) -> None:
    """By NumPy, which lets other threads work meanwhile."""
    if name.endswith("norm.weight"):
        target.fill(1)
    elif name.endswith("bias"):
        target.fill(0)
    else:
        residual = name.endswith("projection.weight")
        std = STD / (2 * layers) ** 0.5 if residual else STD
        _generator(seed, name).standard_normal(out=target, dtype=np.float32)
        target *= np.float32(std)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
