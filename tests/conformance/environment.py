"""What the processes of these tests are started with."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def job_environment(world: int) -> dict[str, str]:
    """One thread each, so that they do not fight for cores; on the CPU where not each has its own GPU."""
    own = {
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT),
        "XTRAIN_EMULATED_FP16": "1",
    }
    if world > 1 and gpus() < world:
        own |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return {**os.environ, **own}


@cache
def gpus() -> int:
    import torch

    return torch.cuda.device_count()
