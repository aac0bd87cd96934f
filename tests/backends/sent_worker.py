"""Counts what one rank sends in a step, collective by collective, as rings send it.

    python -m tests.backends.sent_worker CASES.json OUT.json

as one of two processes. A case is what is changed in the spec.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xtrain import registry
from xtrain.contract import Job, StepInput
from xtrain.data import open_data
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec

STEPS = 3
"""Of which the last is counted: DeepSpeed's stage 3 learns the order of modules first."""
SMALL_BYTES = 1024
"""Norms and flags."""


def make_spec(changes: Mapping[str, Any]) -> Spec:
    tree: dict[str, Any] = {
        "model": {"preset": "gpt2-nano", "layers": 4, "hidden": 64, "heads": 2, "positions": 64},
        "data": {"source": "synthetic", "seq_len": 16, "tokens": 20_000},
        "batch": {"global": 4, "micro": 1},
        "train": {"steps": STEPS},
        "optimizer": {"lr": 1e-3},
    }
    return Spec.model_validate({**tree, **changes})


class Sent(TorchDispatchMode):
    """Bytes by collective."""

    def __init__(self, world: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.share = (world - 1) / world
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return result

    def _count(self, name: str, args: Sequence[Any]) -> None:
        """The largest argument is what is whole, before or after."""
        sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, torch.Tensor)) for arg in args]
        if max(sizes, default=0) > SMALL_BYTES:
            self.bytes[name] += int(max(sizes) * self.share * (2 if "allreduce" in name else 1))


def sent(spec: Spec, job: Job) -> dict[str, int]:
    backend = registry.load("deepspeed")
    data = open_data(spec, show_progress=False)
    engine = backend.start(backend.resolve(spec, job.world), model_source(spec, data.vocab_size), job)
    try:
        for number in range(STEPS):
            batches = data.micro_batches(number, engine.data_rank, engine.data_size)
            with Sent(job.world) as counted:
                engine.train_step(
                    StepInput(number, batches, 1e-3, data.target_tokens(number)), None, NullTrace()
                )
        return dict(counted.bytes)
    finally:
        engine.close()


def main() -> None:
    cases, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = [sent(make_spec(changes), Job(rank, rank, world, world)) for changes in cases]
    if rank == 0:
        out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
