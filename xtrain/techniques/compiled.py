"""torch.compile, block by block, and the arithmetic of the chunked loss.

Only `forward` of each block is replaced, by a compiled one: names, hooks and the model's own loop stay, so a
checkpoint of a compiled run is that of any other. Blocks of one class share their code, so compiling takes
as long for 48 layers as for 2. What stands between blocks goes on as it is: hooks that bring arguments to a
device, recomputed groups, saved tensors that are sent away. Parts of a block that cannot be compiled run
as they were written (torch calls it a graph break).

Every pass of a training has the same shapes, and so does every chunk of the loss but the last: a run has one
variant of each block, and two of the loss. Evaluation, with its other shapes, runs uncompiled.

No torch on import: whether a spec can be compiled is asked where nothing is trained.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from xtrain.contract import Problem
from xtrain.errors import RunFailed
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    from torch import nn

KEY = "train.compile"
COMPILER = "inductor"
"""torch's name for what turns graphs into machine code; tests take a quicker one."""


def compile_problems(spec: Spec, modules: Sequence[str] = ()) -> Iterator[Problem]:
    """What keeps `spec` from being compiled here; `modules` are what the backend's devices need for it."""
    if not spec.train.compile:
        return
    if (chosen := spec.techniques.checkpointing.selective) is not None and chosen.ops:
        expected = "expected false with memory.checkpointing ops: cheap, which looks at single operations"
        yield Problem(KEY, "true", expected, "use memory.checkpointing: {every: 1}, or compile: false")
    if missing := missing_tools(modules):
        expected = f"torch.compile builds machine code and finds no {' and no '.join(missing)}"
        yield Problem(KEY, "true", expected, "install them, or use false")


def compile_notes(spec: Spec) -> list[str]:
    """What a person should know of a run that is compiled."""
    if not spec.train.compile:
        return []
    return [
        "train.compile: memory is not counted by category, for nobody sees what tensors compiled code makes; "
        "evaluation is not compiled"
    ]


def missing_tools(modules: Sequence[str]) -> list[str]:
    """Of what torch.compile builds with, Python's `modules` among it; none of them is imported."""
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    found = {f"compiler ({compiler}; the variable CXX names another)": shutil.which(compiler)}
    found[f"header {header}"] = str(header) if header.exists() else None
    found |= {f"Python module {name}": name if find_spec(name) else None for name in modules}
    return [tool for tool, place in found.items() if place is None]


def compile_model(model: nn.Module, spec: Spec) -> None:
    """Compile the blocks of `model` and its loss, in place, where the spec asks for it.

    Before anything else replaces or wraps `forward` of a block. Nothing is compiled before the first call.
    """
    if not spec.train.compile:
        return
    import torch

    from xtrain.models.blocks import find_blocks
    from xtrain.models.loss import ChunkedHead, loss_and_gradient

    compiled = {}
    for block in find_blocks(model, spec.model.blocks, KEY):
        kind = type(block)
        if kind not in compiled:
            compiled[kind] = torch.compile(kind.forward, backend=COMPILER)
        block.forward = partial(compiled[kind], block)
    for module in model.modules():
        if isinstance(module, ChunkedHead):
            module.arithmetic = torch.compile(loss_and_gradient, backend=COMPILER)


def uncompiled(spec: Spec) -> AbstractContextManager[object]:
    """In it a compiled model runs as it was written."""
    if not spec.train.compile:
        return nullcontext()
    import torch

    eagerly: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eagerly


class FirstStep:
    """Tells that the first step compiles, and how long it took."""

    def __init__(self, spec: Spec, first_rank: bool) -> None:
        self.is_next = spec.train.compile
        self.say: Callable[[str], None] = _say if first_rank else lambda text: None

    @contextmanager
    def told(self) -> Iterator[None]:
        """Around each step; does something at the first."""
        if not self.is_next:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException

        self.is_next = False
        self.say("compiling, once: the first step takes up to some minutes and is left out of speed figures")
        started = perf_counter()
        try:
            yield
        except Exception as error:
            compiling = error if isinstance(error, TorchDynamoException) else error.__cause__
            if not isinstance(compiling, TorchDynamoException):
                raise
            reason = str(compiling).strip().splitlines()[0]
            raise RunFailed(f"{KEY}: torch could not compile this model: {reason}; use false") from error
        self.say(f"compiled: the first step took {perf_counter() - started:.1f} s")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
