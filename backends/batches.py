"""A batch of the loop's, as tensors on the device."""

from __future__ import annotations

import torch

from xtrain.contract import Batch


def on_device(batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets.

    To CUDA they go from pinned memory, which torch gives back once they are there. For a copy from any other
    memory the host would wait, behind all the work that it has queued on the device.
    """
    tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    if device.type == "cuda":
        tokens, targets = tokens.pin_memory(), targets.pin_memory()
    return tokens.to(device, non_blocking=True), targets.to(device, non_blocking=True)
