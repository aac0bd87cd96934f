"""Processes that start quickly and clean: forked from a server that imported torch and did nothing with it.

A fork of the test process itself would inherit what earlier tests left there; autograd, once it has
threads for a second device, refuses to work in a fork at all.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from typing import Any

_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "xtrain.backends.manual"])  # seconds, once


def start(target: Callable[..., object], *arguments: Any, **options: Any) -> ForkServerProcess:
    """`target(*arguments, **options)`, all of which can be pickled, in a process of its own."""
    process = _CONTEXT.Process(target=target, args=arguments, kwargs=options)
    process.start()
    return process
