"""A training script without xtrain's engine, loop or schedule: what `xtrain translate --standalone` is for.

    python -m tests.backends.standalone_script CASES.json OUT.json

Model, data and parameter groups are the spec's; everything else is deepspeed.initialize and its config. The
same job then trains the same specs as `xtrain run` does: starting another costs seconds.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

from tests.conformance.worker import run_case
from xtrain.contract import Job
from xtrain.data import open_data
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec


class MeanLoss(nn.Module):
    """What scripts usually have: a model that returns the mean loss of a micro-batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(tokens, targets) / targets.numel()
        return loss


def train(spec: Spec, ds_config: dict[str, Any]) -> list[float]:
    """The mean loss of every update, over all ranks."""
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    data = open_data(spec, show_progress=False)
    model = MeanLoss(model_source(spec, data.vocab_size).build())
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)
    losses = []
    for step in range(spec.train.steps):
        total = torch.zeros(())
        batches = data.micro_batches(step, rank, world)
        for batch in batches:
            loss = engine(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets))
            engine.backward(loss)
            engine.step()
            total += loss.detach() / len(batches)
        deepspeed.comm.all_reduce(total)
        losses.append(float(total) / world)
    engine.destroy()
    return losses


def main() -> None:
    warnings.filterwarnings("ignore")
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    plain = [train(Spec.model_validate(case["spec"]), case["ds_config"]) for case in cases]
    rank, world = deepspeed.comm.get_rank(), deepspeed.comm.get_world_size()
    job = Job(rank, rank, world, world)
    seam = [run_case(case, job, out.parent)["losses"] for case in cases]
    if rank == 0:
        out.write_text(json.dumps({"plain": plain, "xtrain": seam}))


if __name__ == "__main__":
    main()
