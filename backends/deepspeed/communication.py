"""Communication told apart: DeepSpeed reduces inside its backward pass, gathers inside forward and update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist

from xtrain.contract import Trace

COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "broadcast",
    "gather",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
"""Of deepspeed.comm's backend: what ZeRO calls in a step."""


@contextmanager
def communication_traced(trace: Trace) -> Iterator[None]:
    """In a timed step every collective of DeepSpeed's is a span, and is waited for where it is begun.

    So it is known for what it takes, other ranks' delay included, and overlaps nothing, as nothing does in
    such a step. One process has nothing to say to others.
    """
    if not trace.timed or dist.get_world_size() == 1:
        yield
        return
    import deepspeed.comm.comm as comm

    backend = comm.cdb
    comm.cdb = _Traced(backend, trace)
    try:
        yield
    finally:
        comm.cdb = backend


class _Traced:
    """A backend of deepspeed.comm whose collectives are spans."""

    def __init__(self, backend: Any, trace: Trace) -> None:
        self._backend = backend
        self._trace = trace

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if name not in COLLECTIVES:
            return found

        @wraps(found)
        def traced(*args: Any, **kwargs: Any) -> Any:
            with self._trace.span("reduce"):
                handle = found(*args, **kwargs)
                if handle is not None:  # it was begun, and who asked may wait for it once more
                    handle.wait()
            return handle

        return traced
