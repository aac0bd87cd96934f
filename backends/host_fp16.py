"""Whether the host's processor computes fp16, as far as that can be told without torch."""

from __future__ import annotations

import os
from collections.abc import Collection

from xtrain.measure.machine import cpu_flags

EMULATED = "XTRAIN_EMULATED_FP16"
CPU_FLAGS = {"avx512_fp16", "amx_fp16", "avx_ne_convert"}
"""Any of them, as Linux names them: oneDNN computes fp16 with one of these, and torch asks oneDNN."""
LACKS = "this processor has no fp16 arithmetic (on a CPU avx512_fp16 or AMX)"
INSTEAD = f"use precision: bf16, or set {EMULATED}=1 to have it computed slowly"


def is_emulated() -> bool:
    """Whether someone asked for slow arithmetic."""
    return os.environ.get(EMULATED) == "1"


def surely_lacks_fp16(flags: Collection[str] | None = None) -> bool:
    """Only an x86 CPU names what it can; `flags` are this one's where they are not given."""
    flags = cpu_flags() if flags is None else flags
    return bool(flags) and not CPU_FLAGS & set(flags) and not is_emulated()
