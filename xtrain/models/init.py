"""Initial weights as a function of (seed, parameter name).

Drawn on the CPU in fp32, one parameter at a time, from a counter-based generator keyed by both:
the same on every engine, device, sharding stage and platform, whatever the order of construction.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import nn

STD = 0.02
"""GPT-2's standard deviation; residual projections get 1 / sqrt(2 x layers) of it (GPT-2 paper, 2.3)."""


def initialise(model: nn.Module, seed: int, layers: int) -> None:
    """Set every parameter of a built-in model, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_weight(name, tuple(parameter.shape), seed, layers))


def initial_weight(name: str, shape: tuple[int, ...], seed: int, layers: int) -> torch.Tensor:
    """The fp32 starting value of one parameter of a built-in model with that many layers."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    if name.endswith("bias"):
        return torch.zeros(shape)
    residual = name.endswith("projection.weight")
    std = STD / (2 * layers) ** 0.5 if residual else STD
    drawn = _generator(seed, name).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(drawn).mul_(std)


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], dtype=np.uint64)))
