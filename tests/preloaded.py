"""All that a training imports on its way, and nothing done with it.

Imported once, by the server that processes of tests are forked from (tests/clean_process.py): 3 seconds that
no process then needs, and objects that no garbage collection of theirs looks at.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib import import_module

MODULES = [
    "torch._dynamo",
    "xtrain.backends.manual.engine",
    "xtrain.measure.ledger",
    "xtrain.work",
    "tests.checkpoints.killed_writer",  # and pytest with it
    "tests.conformance.resume_worker",
    "tests.small_runs",
]
DEEPSPEED = [
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # most of torch's compiler
    "deepspeed.runtime.zero.parameter_offload",
    "deepspeed.runtime.zero.stage3",
    "xtrain.backends.deepspeed.engine",
]

for module in (*MODULES, *DEEPSPEED):
    with suppress(ImportError):  # other versions have other modules, and a Mac no DeepSpeed
        import_module(module)
gc.collect()
gc.freeze()
