"""ZeRO-3 that lets go of every parameter after each use, with and without recomputation.

    python -m tests.backends.recompute_worker OUT.json

By default DeepSpeed keeps small parameters gathered, and a model as small as this one would never meet
a parameter that is not there when a block is computed again.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import torch

from tests.techniques.kept import kept_bytes
from xtrain import registry
from xtrain.contract import Job, StepInput
from xtrain.data import open_data
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec

WAYS: dict[str, Any] = {
    "none": "none",
    "each": {"every": 1},
    "groups": {"every": 3},
    "ops": {"selective": {"ops": "cheap"}},
}
STEPS, BATCH, SEQ_LEN = 4, 4, 32
NOTHING_STAYS = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
}


def make_spec(checkpointing: Any) -> Spec:
    return Spec.model_validate(
        {
            "model": {"preset": "gpt2-nano", "layers": 4, "hidden": 64, "heads": 2, "dropout": 0.1},
            "data": {"source": "synthetic", "seq_len": SEQ_LEN, "tokens": 40_000},
            "batch": {"global": BATCH, "micro": BATCH // 2},
            "train": {"steps": STEPS, "clip": None},
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
            "memory": {"sharding": "parameters", "checkpointing": checkpointing},
        }
    )


def run(checkpointing: Any) -> dict[str, Any]:
    spec = make_spec(checkpointing)
    data = open_data(spec, show_progress=False)
    backend = registry.load("deepspeed")
    resolved = backend.resolve(spec, 1)
    config = cast(dict[str, Any], resolved.settings["ds_config"])
    config["zero_optimization"].update(NOTHING_STAYS)
    engine = cast(Any, backend.start(resolved, model_source(spec, data.vocab_size), Job()))
    results = []
    for step in range(STEPS):
        stepped = StepInput(step, data.micro_batches(step, 0, 1), 0.1, BATCH * SEQ_LEN)
        results.append(engine.train_step(stepped, None, NullTrace()))
    values = engine.fetch(results)
    statuses = {parameter.ds_status.name for parameter in engine.engine.module.parameters()}
    batch = data.micro_batches(STEPS, 0, 1)[0]
    tokens, targets = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    kept = kept_bytes(lambda: engine.engine(tokens, targets))
    engine.close()
    return {
        "losses": [value.loss for value in values],
        "norms": [value.grad_norm for value in values],
        "statuses": sorted(statuses),
        "kept_bytes": kept,
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    Path(sys.argv[1]).write_text(json.dumps({name: run(way) for name, way in WAYS.items()}))


if __name__ == "__main__":
    main()
