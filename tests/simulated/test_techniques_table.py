"""What each technique saves on a device, by category: the table in docs/techniques.md, made by real steps.

The same model and the same global batch in every row, on the simulated device, where the ledger
counts every storage of the second step: the same numbers on every machine.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.worker import Collector
from tests.simulated.backend import simulated_backend
from tests.simulated.test_placement import start
from xtrain.contract import MEMORY_CATEGORIES, Backend
from xtrain.data import open_data
from xtrain.loop import Loop
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec

pytestmark = pytest.mark.slow

TABLE = Path(__file__).parents[2] / "docs" / "techniques.md"
BEGIN, END = "<!-- effects -->\n", "<!-- end -->\n"
MIB = 2**20

BASE: dict[str, Any] = {
    "model": {"preset": "gpt2-nano", "layers": 8, "hidden": 128, "heads": 4, "vocab_size": 2048},
    "data": {"source": "synthetic", "seq_len": 128, "tokens": 40_000},
    "batch": {"global": 8},
    "train": {"steps": 3},
    "optimizer": {"lr": 1e-3},
    "memory": {"loss_chunk": "none"},
}
BF16 = {"dtype": "bf16", "weights": "bf16"}
STATE = {"optimizer": "cpu", "gradients": "cpu"}
HALVES = {"devices": ["main", "cpu"], "split": [4, 4]}
ONE_BY_ONE = {"every": 1}
LEAST_KEPT = {"checkpointing": ONE_BY_ONE, "loss_chunk": 64}
"""What is left are weights, gradients and moments."""
ROWS: dict[str, dict[str, Any]] = {
    "nothing on, fp32": {},
    "`batch.micro: 2` of 8": {"batch": {"global": 8, "micro": 2}},
    "`precision: bf16`": {"precision": "bf16"},
    "`{dtype: bf16, weights: bf16}`": {"precision": BF16},
    "`loss_chunk: 64`": {"memory": {"loss_chunk": 64}},
    "`checkpointing: auto`": {"memory": {"checkpointing": "auto"}},
    "`checkpointing: {every: 1}`": {"memory": {"checkpointing": ONE_BY_ONE}},
    "`{selective: {ratio: 0.5}}`": {"memory": {"checkpointing": {"selective": {"ratio": 0.5}}}},
    "`{selective: {ops: cheap}}`": {"memory": {"checkpointing": {"selective": {"ops": "cheap"}}}},
    "half of the layers on the CPU": {"manual": HALVES},
    "`offload.optimizer: cpu`": {"memory": {"offload": {"optimizer": "cpu"}}},
    "`offload.optimizer`, `gradients: cpu`": {"memory": {"offload": STATE}},
    "`offload.activations: cpu`": {"memory": {"offload": {"activations": "cpu"}}},
    "`{every: 1}`, `loss_chunk: 64`": {"memory": LEAST_KEPT},
    "the same, `optimizer_in_backward`": {
        "memory": {**LEAST_KEPT, "optimizer_in_backward": True},
        "train": {"steps": 3, "clip": None},
    },
    "full stack, recomputed in groups of 3": {
        "precision": BF16,
        "memory": {"offload": STATE, "checkpointing": {"every": 3}, "loss_chunk": 64},
        "manual": HALVES,
    },
    "full stack, one by one": {
        "precision": BF16,
        "memory": {"offload": STATE, "checkpointing": ONE_BY_ONE, "loss_chunk": 64},
        "manual": HALVES,
    },
}


def held(backend: Backend, change: dict[str, Any]) -> dict[str, int]:
    """Bytes by category on the device at the fullest moment of the second step."""
    memory = {**BASE["memory"], **change.get("memory", {})}
    spec = Spec.model_validate({**BASE, **change, "memory": memory})
    gc.collect()
    engine, data = start(backend, spec), open_data(spec, show_progress=False)
    loop = Loop(engine, data, learning_rate(spec), Collector(), 7)
    loop.run(0, 3)
    engine.close()
    assert loop.step_memory is not None
    return dict(loop.step_memory.peaks["sim:0"])


def table() -> str:
    """As it stands in the docs: MiB to a tenth."""
    head = ["", "peak", "of the first", *MEMORY_CATEGORIES]
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    first = 0
    with simulated_backend() as backend:
        for name, change in ROWS.items():
            found = held(backend, change)
            total = sum(found.values())
            first = first or total
            parts = [f"{found.get(category, 0) / MIB:.1f}" for category in MEMORY_CATEGORIES]
            row = [name, f"{total / MIB:.1f}", f"{total / first:.2f}", *parts]
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, ""])


def test_the_table_in_the_docs_is_what_is_measured() -> None:
    """When it is not: `python -m tests.simulated.test_techniques_table` prints the new one."""
    text = TABLE.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0] == table()


if __name__ == "__main__":
    print(table())
