"""DeepSpeed's engine with compiled blocks and without, at the stages that can have them.

python tests/backends/compiled_worker.py OUT.json
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from xtrain import registry
from xtrain.contract import Job, StepInput
from xtrain.data import open_data
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec
from xtrain.techniques import compiled

CASES: dict[str, dict[str, Any]] = {
    "stage 0": {},
    "stage 1, bf16 weights": {
        "memory": {"sharding": "optimizer"},
        "precision": {"dtype": "bf16", "weights": "bf16"},
    },
    "stage 2, recomputed, bf16": {
        "memory": {"sharding": "gradients", "checkpointing": {"every": 1}},
        "precision": "bf16",
    },
}
STEPS, BATCH, SEQ_LEN = 4, 4, 16


def make_spec(changes: dict[str, Any], compile_: bool) -> Spec:
    return Spec.model_validate(
        {
            "model": {"preset": "gpt2-nano", "layers": 2, "hidden": 32, "heads": 2},
            "data": {"source": "synthetic", "seq_len": SEQ_LEN, "tokens": 20_000},
            "batch": {"global": BATCH, "micro": BATCH // 2},
            "train": {"steps": STEPS, "clip": None, "compile": compile_},
            "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
            **changes,
        }
    )


def run(spec: Spec) -> dict[str, Any]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    data = open_data(spec, show_progress=False)
    backend = registry.load("deepspeed")
    assert backend.problems(spec, 1) == []
    engine = backend.start(backend.resolve(spec, 1), model_source(spec, data.vocab_size), Job())
    results = []
    for step in range(STEPS):
        stepped = StepInput(step, data.micro_batches(step, 0, 1), 0.1, BATCH * SEQ_LEN)
        results.append(engine.train_step(stepped, None, NullTrace()))
        if step == 0:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    values = engine.fetch(results)
    names = [str(key) for key in engine.state_layout()]
    engine.close()
    return {
        "losses": [value.loss for value in values],
        "names": names,
        "graphs": graphs,
        "graphs_at_the_end": torch._dynamo.utils.counters["stats"]["unique_graphs"],
    }


def main() -> None:
    warnings.filterwarnings("ignore")
    compiled.COMPILER = "aot_eager"
    found = {
        name: {word: run(make_spec(changes, word == "compiled")) for word in ("compiled", "plain")}
        for name, changes in CASES.items()
    }
    Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
