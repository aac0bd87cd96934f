"""One case of the plan's accuracy: two steps of its engine, the second counted by the ledger.

`python -m benchmarks.plan_measure CASES.json RESULT.json` measures many in one process of a job.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.plan_cases import SIMULATED, Case
from xtrain import registry
from xtrain.contract import Backend, ByPlace, Job, StepInput
from xtrain.data import open_data
from xtrain.measure.ledger import Ledger
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec


def measure(case: Case, job: Job | None = None) -> ByPlace:
    """Bytes at each place's peak by category, of this process."""
    with tempfile.TemporaryDirectory() as folder, _backend(case) as backend:
        return _measure(case.spec(Path(folder)), backend, job or Job())


@contextmanager
def _backend(case: Case) -> Iterator[Backend]:
    if case.backend != SIMULATED:
        yield registry.load(case.backend)
        return
    from tests.simulated.backend import simulated_backend

    with simulated_backend() as backend:
        yield backend


def _measure(spec: Spec, backend: Backend, job: Job) -> ByPlace:
    data = open_data(spec, show_progress=False)
    engine = backend.start(backend.resolve(spec, job.world), model_source(spec, data.vocab_size), job)

    def step(number: int) -> StepInput:
        batches = data.micro_batches(number, engine.data_rank, engine.data_size)
        return StepInput(number, batches, 1e-3, data.target_tokens(number))

    try:
        engine.train_step(step(0), None, NullTrace())
        ledger = Ledger(engine.holdings)
        with ledger.open():
            engine.train_step(step(1), None, ledger)
        return ledger.peaks
    finally:
        engine.close()


def main() -> None:
    cases, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    job = Job(rank, int(os.environ["LOCAL_RANK"]), world, world)
    found = [measure(Case(**case), job) for case in cases]
    if rank == 0:
        result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
