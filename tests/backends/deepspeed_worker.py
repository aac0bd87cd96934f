"""Drives the DeepSpeed engine through the contract, and writes down what the tests compare.

    python -m tests.backends.deepspeed_worker OUT.json

or the same under torch.distributed.run. One job runs every scenario: starting one costs seconds.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from xtrain import registry
from xtrain.contract import IGNORED_TARGET, Accept, Batch, Engine, Job, StepInput
from xtrain.measure.trace import NullTrace, SampledTrace
from xtrain.spec.tree import Spec

SHARDING = ("none", "optimizer", "gradients", "parameters")
STEPS = 6
TRACED_STEP = 2
GLOBAL_BATCH = 4
SEQ_LEN, VOCAB, HIDDEN = 8, 32, 16
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
ADAMW: dict[str, Any] = {"name": "adamw", "lr": 2e-3}
BITING_CLIP = 0.3
REFUSED_STEPS = (1, 3)
"""The guarded scenario refuses these; the others must go on as if they had never been."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        mixed: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))
        return x + mixed


class TiedTransformer(nn.Module):
    """(tokens, targets) -> sum of token losses; the embedding is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.blocks(self.embedding(tokens))).float()
        flat = logits.flatten(0, 1), targets.flatten()
        return F.cross_entropy(*flat, ignore_index=IGNORED_TARGET, reduction="sum")


class Source:
    description = "a tied transformer of two layers"

    def build(self) -> nn.Module:
        torch.manual_seed(7)
        return TiedTransformer()

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2


def batch(step: int, sequence: int) -> Batch:
    """One sequence; the share of masked targets differs from one to the next."""
    random = np.random.default_rng([step, sequence])
    tokens, targets = random.integers(0, VOCAB, (2, 1, SEQ_LEN))
    targets[random.random(targets.shape) < 0.2 * sequence] = IGNORED_TARGET
    return Batch(tokens, targets)


def global_batch(step: int) -> list[Batch]:
    return [batch(step, sequence) for sequence in range(GLOBAL_BATCH)]


def count_targets(batches: list[Batch]) -> int:
    return int(sum((b.targets != IGNORED_TARGET).sum() for b in batches))


def make_spec(sharding: str, optimizer: dict[str, Any], clip: float | None, precision: str = "fp32") -> Spec:
    return Spec.model_validate(
        {
            "model": {"factory": "unused:unused"},
            "data": {"source": "synthetic", "seq_len": SEQ_LEN},
            "batch": {"global": GLOBAL_BATCH, "micro": 1},
            "train": {"steps": STEPS, "clip": clip},
            "optimizer": optimizer,
            "schedule": "constant",
            "precision": precision,
            "memory": {"sharding": sharding},
        }
    )


def run(spec: Spec, job: Job, accept: Accept | None = None) -> dict[str, Any]:
    """Train for STEPS; what the engine says of every step, of an evaluation before, and of its ranks."""
    backend = registry.load("deepspeed")
    engine: Engine = backend.start(backend.resolve(spec, job.world), Source(), job)
    share = GLOBAL_BATCH // job.world
    mine = slice(job.rank * share, (job.rank + 1) * share)
    evaluated = engine.evaluate(global_batch(99)[mine])
    results = []
    timed = SampledTrace(engine.synchronize, lambda: None)
    for step in range(STEPS):
        everyones = global_batch(step)
        stepped = StepInput(step, everyones[mine], spec.optimizer.lr, count_targets(everyones))
        trace = timed if step == TRACED_STEP else NullTrace()
        results.append(engine.train_step(stepped, accept, trace))
    found = {
        "spans": engine.gather(timed.seconds),
        "steps": [asdict(values) for values in engine.fetch(results)],
        "evaluated": [evaluated.total, evaluated.tokens],
        "gathered": engine.gather({"rank": job.rank}),
        "place": [engine.data_rank, engine.data_size],
        "parameter_count": engine.parameter_count,
        "held_bytes": engine.gather(dict(engine.memory().categories or {})),
    }
    engine.close()
    return found


def run_guarded(sharding: str, job: Job) -> dict[str, Any]:
    asked: list[tuple[float, float | None]] = []

    def accept(loss: float, norm: float | None) -> bool:
        asked.append((loss, norm))
        return len(asked) - 1 not in REFUSED_STEPS

    return {**run(make_spec(sharding, SGD, BITING_CLIP), job, accept), "asked": asked}


def scenarios(sharding: str, job: Job) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "sgd": lambda: run(make_spec(sharding, SGD, None), job),
        "sgd-clipped": lambda: run(make_spec(sharding, SGD, BITING_CLIP), job),
        "adamw": lambda: run(make_spec(sharding, ADAMW, 1.0), job),
        "bf16": lambda: run(make_spec(sharding, SGD, None, "bf16"), job),
        "guarded": lambda: run_guarded(sharding, job),
    }


def shared_memory_of_this_job() -> list[Path]:
    """Files of DeepSpeed's, which it names after the port where the job met."""
    return list(Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_*"))


def main() -> None:
    warnings.filterwarnings("ignore")
    place = [int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0))]
    world = int(os.environ.get("WORLD_SIZE", 1))
    job = Job(place[0], place[1], world, world)
    linear = F.linear
    found = {s: {name: go() for name, go in scenarios(s, job).items()} for s in SHARDING}
    from deepspeed.accelerator import get_accelerator

    if job.rank == 0:
        report = {
            "runs": found,
            "linear_untouched": F.linear is linear,
            "processes_here": get_accelerator().device_count(),
            "left_in_shared_memory": [file.name for file in shared_memory_of_this_job()],
        }
        Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
