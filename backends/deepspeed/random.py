"""torch's random generators as text, for checkpoints."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import torch

from xtrain.contract import JSON


def random_state(device: torch.device) -> dict[str, JSON]:
    """The CPU's generator, and the GPU's where there is one."""
    state: dict[str, JSON] = {"cpu": _encode(torch.get_rng_state())}
    if device.type == "cuda":
        state["cuda"] = _encode(torch.cuda.get_rng_state(device))
    if device.type == "mps":
        state["mps"] = _encode(torch.mps.get_rng_state())
    return state


def set_random_state(device: torch.device, state: Mapping[str, str]) -> None:
    """The inverse; what was drawn on another kind of device means nothing here and is left out."""
    if "cpu" in state:
        torch.set_rng_state(_decode(state["cpu"]))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(_decode(state["cuda"]), device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(_decode(state["mps"]))


def _encode(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
