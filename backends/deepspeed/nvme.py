"""Whether this machine can hold on a drive what the spec puts there: asked before anything starts."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from xtrain.contract import Problem
from xtrain.spec.tree import Offload

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

HEADER = "libaio.h"
INSTALL = "install libaio-dev (Debian, Ubuntu) or libaio-devel (Fedora)"


def nvme_problems(spec: Spec, has_libaio: bool | None = None) -> Iterator[Problem]:
    """Folders that are not there or not writable, and the library that DeepSpeed writes with."""
    for name in Offload.model_fields:
        target = getattr(spec.techniques.offload, name)
        if target.device != "nvme" or not target.path:
            continue
        path = f"memory.offload.{name}"
        yield from _folder(f"{path}.path", target.path)
        if not (find_libaio() if has_libaio is None else has_libaio):
            expected = f"DeepSpeed writes to a drive through libaio, and {HEADER} was not found here"
            yield Problem(f"{path}.device", "nvme", expected, f"{INSTALL}, or use cpu")


def find_libaio() -> bool:
    """Whether the compiler would find the header, which comes with the library to link with.

    For `check`, `doctor` and the tests alike; DeepSpeed itself tries to compile, which takes seconds.
    """
    return any((folder / HEADER).exists() for folder in _include_folders())


def _include_folders() -> Iterator[Path]:
    yield from (Path(folder) for folder in ("/usr/include", "/usr/local/include", f"{sys.prefix}/include"))
    for variable in ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"):
        yield from (Path(folder) for folder in os.environ.get(variable, "").split(os.pathsep) if folder)
    if conda := os.environ.get("CONDA_PREFIX"):
        yield Path(conda) / "include"
    for word in shlex.split(os.environ.get("CFLAGS", "")):
        if word.startswith("-I"):
            yield Path(word[2:])


def _folder(key: str, name: str) -> Iterator[Problem]:
    try:
        missing = not Path(name).is_dir()
    except (OSError, ValueError):
        missing = True
    if missing:
        yield Problem(key, name, "no such folder here", "make it on the drive of every machine of the run")
        return
    try:
        NamedTemporaryFile(dir=name, prefix=".xtrain-").close()
    except OSError as error:
        expected = f"expected a folder that can be written to: {error.strerror}"
        yield Problem(key, name, expected, "change its permissions, or use another one")
