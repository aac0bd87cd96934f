"""Stops trainings in the middle and goes on with them, as `xtrain run` does, on fresh engines.

    python -m tests.conformance.resume_worker PLAN.json OUT_FOLDER

or the same under torch.distributed.run. A leg begins at its folder's checkpoint, or at step 0 where there
is none, and leaves a checkpoint there; so a training moves between jobs with its folder.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from tests.conformance.worker import Collector, WrongGradients
from xtrain import registry
from xtrain.checkpoints.format import OPTIMIZER_INDEX, complete_checkpoints
from xtrain.checkpoints.manager import Checkpointer, restore
from xtrain.contract import Job, ModelSource
from xtrain.data import open_data
from xtrain.errors import RunFailed
from xtrain.guards import Guards
from xtrain.launching.job import join
from xtrain.loop import Loop
from xtrain.models.source import model_source
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec


def run_leg(leg: dict[str, Any], job: Job) -> dict[str, Any]:
    """Train from the folder's checkpoint to `stop` updates, and save there."""
    spec = Spec.model_validate(leg["spec"])
    folder = Path(leg["folder"])
    data = open_data(spec, show_progress=False)
    backend = registry.load(leg["backend"])
    resolved = backend.resolve(spec, job.world)
    source: ModelSource = model_source(spec, data.vocab_size)
    if factors := leg.get("gradient_factors"):
        wrong = {int(step): factor for step, factor in factors.items()}
        source = WrongGradients(source, wrong, spec.accumulation(job.world))
    engine = backend.start(resolved, source, job)
    guards = Guards(spec.stability) if spec.stability else None
    found = complete_checkpoints(folder)
    start = restore(engine, found[-1], guards, job.rank) if found else 0
    engine.gather(None)  # all have read before one writes
    own = folder if job.rank == 0 else None
    collector = Collector()
    checkpointer = Checkpointer(
        spec.checkpoint,
        resolved,
        data.content_hash,
        guards,
        own,
        print,
        lambda: None,
        job.rank,
        last_step=start,
    )
    loop = Loop(
        engine,
        data,
        learning_rate(spec),
        collector,
        7,
        guards=guards,
        checkpointer=checkpointer,
        audits=leg.get("audited", False),
    )
    failure = ""
    try:
        loop.run(start, leg["stop"])
    except RunFailed as error:
        failure = str(error)
    engine.gather(None)  # saved, before the next leg looks
    engine.close()
    if leg.get("drop_moments") and job.rank == 0:
        (complete_checkpoints(folder)[-1].path / OPTIMIZER_INDEX).write_text('{"weight_map": {}}')
    return {
        "failure": failure,
        "copied_bytes": checkpointer.buffers.bytes,
        "losses": [record.loss for record in collector.records],
        "skipped": [record.skipped for record in collector.records],
        "loss_scales": [record.loss_scale for record in collector.records],
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    plan, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    job = join(os.environ) or Job()
    results = {leg["name"]: run_leg(leg, job) for leg in plan}
    if job.rank == 0:
        (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
