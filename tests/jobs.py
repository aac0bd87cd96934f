"""Jobs of one or more processes, as torchrun places them, that start in a moment (tests/clean_process.py).

That torchrun and the other launchers really start jobs is tested in conformance/test_commands.py.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.clean_process import start_module

ROOT = Path(__file__).parents[1]
LONGEST_SECONDS = 600
"""On a machine that has other work too, and compiles DeepSpeed's operators first."""
ON_THE_CPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


def run_job(world: int, module: str, *arguments: str | Path, **environ: str) -> None:
    """`python -m MODULE ARGUMENTS` to its end, on `world` processes; what one said where it failed."""
    with TemporaryDirectory() as folder:
        said = [Path(folder) / str(rank) for rank in range(world)]
        ranks = [
            start_module(module, *arguments, said=said[rank], environ={**place, **environ})
            for rank, place in enumerate(places(world))
        ]
        try:
            wait_for_all(ranks, said)
        finally:
            for process in ranks:
                process.kill()


def wait_for_all(ranks: Sequence[BaseProcess], said: Sequence[Path]) -> None:
    """Until all have ended well; fails with the first that did not, for which others would wait."""
    waiting = dict(enumerate(ranks))
    while waiting:
        ended = wait([process.sentinel for process in waiting.values()], LONGEST_SECONDS)
        assert ended, f"ranks {list(waiting)} have not ended"
        for rank in [rank for rank, process in waiting.items() if process.sentinel in ended]:
            process = waiting.pop(rank)
            process.join()
            assert process.exitcode == 0, said[rank].read_text()[-4000:]


def places(world: int) -> list[dict[str, str]]:
    """The environment of each process."""
    if world == 1:
        return [job_environment(1)]
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    size = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    common = {**job_environment(world), **meet, **size}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def job_environment(world: int) -> dict[str, str]:
    """One thread each, so that they do not fight for cores; on the CPU where not each has its own GPU.

    This Python's ninja comes first: another version would compile DeepSpeed's operators anew.
    """
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT),
        "XTRAIN_EMULATED_FP16": "1",
    }
    if world > 1 and gpus() < world:
        own |= ON_THE_CPU
    return {**os.environ, **own}


@cache
def gpus() -> int:
    import torch

    return torch.cuda.device_count()
