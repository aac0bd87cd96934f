"""The operators that DeepSpeed compiles where it first needs them: which, and where they are kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

SHARED_MEMORY = "deepspeed_shm_comm"
"""Reductions between the processes of one host, on a CPU; also for a single one."""
FILES = "async_io"
"""Reading and writing what lives on a drive."""


def needed(spec: Spec, on_cpu: bool) -> list[str]:
    """The operators that a run of `spec` loads."""
    targets = (spec.techniques.offload.optimizer, spec.techniques.offload.parameters)
    on_drive = any(target.device == "nvme" for target in targets)
    return [SHARED_MEMORY] * on_cpu + [FILES] * on_drive


def announce(names: Collection[str], installed: Collection[str], say: Callable[[str], None]) -> None:
    """One line if some of `names` must be compiled first; `installed` came ready-made with DeepSpeed."""
    missing = [name for name in names if name not in installed and not _is_compiled(name)]
    if missing:
        where = os.environ.get("TORCH_EXTENSIONS_DIR") or _default_root()
        say(
            f"DeepSpeed now compiles {' and '.join(missing)} into {where}, once for this Python and torch; "
            "that usually takes half a minute each"
        )


def folders() -> list[Path]:
    """Where torch keeps what is compiled: one folder, or by default one for each Python and torch."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    return [Path(root)] if root else sorted(_default_root().glob("py*"))


def _default_root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def _is_compiled(name: str) -> bool:
    """By this Python, from this DeepSpeed: what another environment left in the same folder is made anew."""
    ours = f"py{sys.version_info.major}{sys.version_info.minor}"
    chosen = "TORCH_EXTENSIONS_DIR" in os.environ
    places = [one for one in folders() if chosen or one.name.startswith(ours)]
    return any(_is_from_here(place / name, f"{name}.so") for place in places)


def _is_from_here(folder: Path, library: str) -> bool:
    """Whether the library is there, and its recipe names the sources of the DeepSpeed that is installed."""
    found = find_spec("deepspeed")
    recipe = folder / "build.ninja"
    if not (folder / library).exists() or not recipe.exists() or found is None or found.origin is None:
        return False
    return str(Path(found.origin).parent) in recipe.read_text(encoding="utf-8", errors="replace")
