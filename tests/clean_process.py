"""Processes that start quickly and clean: forked from a server that has imported what is heavy and done
nothing with it.

A fork of the test process itself would inherit what earlier tests left there; autograd, once it has
threads for a second device, refuses to work in a fork at all.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any


@cache
def _process() -> type[ForkServerProcess] | type[SpawnProcess]:
    import torch

    if torch.cuda.is_available():
        return SpawnProcess  # what DeepSpeed asks a GPU when it is imported makes it useless to a fork
    get_context("forkserver").set_forkserver_preload(["tests.preloaded"])  # seconds, once
    return ForkServerProcess


def start(target: Callable[..., object], *arguments: Any, **options: Any) -> BaseProcess:
    """`target(*arguments, **options)`, all of which can be pickled, in a process of its own."""
    process = _process()(target=target, args=arguments, kwargs=options, daemon=True)
    process.start()
    return process


def start_module(
    module: str, *arguments: str | int | Path, said: Path, environ: Mapping[str, str]
) -> BaseProcess:
    """`python -m MODULE ARGUMENTS` with that added to its environment; all that it says goes to a file."""
    return start(_become, module, [str(word) for word in arguments], said, dict(environ))


def _become(module: str, arguments: list[str], said: Path, environ: Mapping[str, str]) -> None:
    os.environ.update(environ)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without them
