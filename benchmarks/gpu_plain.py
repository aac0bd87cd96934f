"""The loop that `make gpu` holds xtrain against: plain PyTorch on one GPU, as an expert writes it.

    python -m benchmarks.gpu_plain SETTINGS.json RESULT.json

bf16 autocast, fused AdamW, tokens on the device before the clock runs, nothing brought to the host in
between, and with `compile` torch.compile over model and loss. The model and its weights are xtrain's, with
its logits whole. Speed is that of all steps after the first few, between two synchronisations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.plain_loop import build_model, build_optimizer
from benchmarks.workload import Workload

WARMUP_STEPS = 5


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def train(load: Workload, batches: np.ndarray, device: torch.device, compiled: bool) -> dict[str, Any]:
    """Tokens per second, peak bytes (None on the CPU) and losses."""
    model = build_model(load).to(device).train()
    optimizer = build_optimizer(load, model, fused=True)
    parameters = list(model.parameters())
    inputs = torch.from_numpy(batches).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=load.precision == "bf16")

    def loss_of(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(tokens)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    loss_function = torch.compile(loss_of) if compiled else loss_of
    losses, started = [], 0.0
    for step in range(load.steps):
        if step == WARMUP_STEPS:
            synchronize(device)
            started = perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = load.learning_rate(step)
        step_loss = torch.zeros((), device=device)
        for tokens, targets in inputs[step]:
            with autocast:
                loss = loss_function(tokens, targets) / load.accumulation
            loss.backward()
            step_loss += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, load.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(step_loss)
    synchronize(device)
    seconds = perf_counter() - started
    return {
        "tokens_per_second": load.tokens_per_step * (load.steps - WARMUP_STEPS) / seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "losses": torch.stack(losses).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("settings", type=Path, help='{"workload": ..., "device": ..., "compile": ...}')
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    settings = json.loads(arguments.settings.read_text())
    from xtrain.data import open_data
    from xtrain.spec.tree import Spec

    load = Workload(**{**settings["workload"], "betas": tuple(settings["workload"]["betas"])})
    data = open_data(Spec.model_validate(load.spec()), show_progress=False)
    steps = [data.micro_batches(step, data_rank=0, data_size=1) for step in range(load.steps)]
    batches = np.array([[(batch.tokens, batch.targets) for batch in micro] for micro in steps])
    found = train(load, batches, torch.device(settings["device"]), settings["compile"])
    arguments.result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
