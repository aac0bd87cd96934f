"""A checkpoint's contents for people."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from xtrain.printable import printable
from xtrain.records.summary import format_bytes


def rendered(found: Mapping[str, Any], tensors: bool) -> str:
    """The lines of `xtrain checkpoint show`; with `tensors` one more for each of them."""
    elements = sum(math.prod(shape) for shape in found["tensors"].values())
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    best = found["best"]
    lines = {
        "checkpoint": found["path"],
        "step": found["step"],
        "written by": f"{found['backend']} x{found['world']}, format version {found['format_version']}",
        "weights": f"{len(found['tensors'])} tensors, {elements:,} elements",
        "moments": ", ".join(found["moments"]) or "none",
        "size": f"{format_bytes(found['bytes'])} in {len(found['files'])} files",
        "best so far": f"step {best[0]}, eval_loss {best[1]:.4f}" if best else "not asked for",
        "loss scaler": found["loss_scaler"] or "none",
        "data hash": found["data_hash"],
        "versions": versions,
    }
    text = [f"{name:<12} {printable(str(value))}" for name, value in lines.items()]
    if tensors:
        text += [f"  {printable(name)}  {shape}" for name, shape in found["tensors"].items()]
    return "\n".join(text)
