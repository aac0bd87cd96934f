"""Runs cases through the seam, as `xtrain run` does, and writes down what the tests compare.

    python -m tests.conformance.worker CASES.json OUT_FOLDER

or the same under torch.distributed.run. One process runs many cases: starting one costs seconds.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from tests.whole_state import whole_state
from xtrain import registry
from xtrain.contract import Engine, Job, ModelSource
from xtrain.data import open_data
from xtrain.guards import Guards
from xtrain.launching.job import join
from xtrain.loop import Loop
from xtrain.models.source import model_source
from xtrain.records.metrics import StepRecord
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec


class Collector:
    def __init__(self) -> None:
        self.records: list[StepRecord] = []

    def saw(self, record: StepRecord) -> None:
        self.records.append(record)


class WrongGradients:
    """A model source whose gradients, or losses and gradients, are wrong in a planned way.

    In all micro-batches of a step; a NaN in the last one alone, which must be enough.
    """

    def __init__(
        self,
        source: ModelSource,
        factors: dict[int, float],
        passes_per_step: int,
        loss_factors: Mapping[int, float] | None = None,
    ) -> None:
        self.source = source
        self.description = source.description
        self.factors = factors
        self.passes_per_step = passes_per_step
        self.loss_factors = loss_factors or {}

    def build(self) -> Any:
        import torch

        class Scaled(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, loss: torch.Tensor, factor: float) -> torch.Tensor:
                ctx.factor = factor
                return loss.clone()

            @staticmethod
            def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
                return upstream * ctx.factor, None

        model = self.source.build()
        plain, passes = model.forward, count()

        def forward(tokens: torch.Tensor, targets: torch.Tensor) -> Any:
            step, micro_batch = divmod(next(passes), self.passes_per_step)
            factor = self.factors.get(step, self.factors.get(-1, 1.0))
            if math.isnan(factor) and micro_batch + 1 < self.passes_per_step:
                factor = 1.0
            loss = plain(tokens, targets) * self.loss_factors.get(step, 1.0)
            return Scaled.apply(loss, factor)  # type: ignore[no-untyped-call]

        model.forward = forward
        return model

    def decayed(self, name: str, parameter: Any) -> bool:
        return self.source.decayed(name, parameter)


def run_case(case: dict[str, Any], job: Job, out: Path) -> dict[str, Any]:
    """Train; returns losses and norms, and with `keep_weights` leaves the weights in OUT/<name>.npz."""
    spec = Spec.model_validate(case["spec"])
    data = open_data(spec, show_progress=False)
    source: ModelSource = model_source(spec, data.vocab_size)
    if case["gradient_factors"] or case["loss_factors"]:
        here = case["wrong_rank"] in (None, job.rank)  # the others take the same way, with nothing wrong
        planned = [case[kind] if here else {} for kind in ("gradient_factors", "loss_factors")]
        gradients, losses = ({int(step): factor for step, factor in factors.items()} for factors in planned)
        source = WrongGradients(source, gradients, spec.accumulation(job.world), losses)
    backend = registry.load(case["backend"])
    problems = backend.problems(spec, job.world)
    if problems:
        return {"refused": [str(problem) for problem in problems]}
    engine = backend.start(backend.resolve(spec, job.world), source, job)
    collector = Collector()
    guards = Guards(spec.stability) if spec.stability else None
    loop = Loop(
        engine,
        data,
        learning_rate(spec),
        collector,
        7,
        spec.train.eval_every,
        guards,
        audits=case["audited"],
    )
    loop.run(0, spec.train.steps)
    if case["keep_weights"]:
        _keep_weights(engine, job, out / f"{case['name']}.npz")
    engine.close()
    return {
        "losses": [record.loss for record in collector.records],
        "norms": [record.grad_norm for record in collector.records],
        "eval_losses": [record.eval_loss for record in collector.records],
        "skipped": [record.skipped for record in collector.records],
        "loss_scales": [record.loss_scale for record in collector.records],
    }


def _keep_weights(engine: Engine, job: Job, path: Path) -> None:
    state = whole_state(engine)
    weights = {name: value.numpy() for (name, kind), value in state.items() if kind == "weight"}
    if job.rank == 0:
        np.savez(path, **weights)  # type: ignore[arg-type]


def main() -> None:
    warnings.filterwarnings("ignore")
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    job = join(os.environ) or Job()
    results = {case["name"]: run_case(case, job, out) for case in cases}
    if job.rank == 0:
        (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
