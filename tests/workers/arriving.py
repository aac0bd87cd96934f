"""`python -m tests.workers.arriving RANK WORLD PORT WHAT`: one process of a preflight; prints how it went.

WHAT: `fits`; `other-spec` and `late-clock`, planted in rank 1; `fails`, which rank 1 does before.
"""

from __future__ import annotations

import os
import sys
import time

from xtrain.contract import Job
from xtrain.errors import RequestError, XtrainError
from xtrain.launching.preflight import ADDRESS, known, preflight, told_to_others
from xtrain.spec.tree import Spec

rank, world, port = (int(word) for word in sys.argv[1:4])
what = sys.argv[4] if rank == 1 else "fits"
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
os.environ[ADDRESS] = f"host-{rank}"
job = Job(rank, rank, world, world)
spec = Spec.model_validate(
    {
        "model": {"preset": "gpt2-nano"},
        "data": {"source": "synthetic"},
        "batch": {"global": 4},
        "train": {"steps": 20 if what == "other-spec" else 10},
        "optimizer": {"lr": 1e-3},
    }
)
try:
    with told_to_others(job):
        if what == "fails":
            raise RequestError("no such file")
    facts = known(job, spec, "0123456789abcdef")
    ahead = 3600.0 if what == "late-clock" else 0.0
    preflight(job, facts, 60.0, lambda text: print(text, flush=True), lambda: time.time() + ahead)
    print("fits", flush=True)
except XtrainError as error:
    print(f"{error.exit_code}: {error}", flush=True)
