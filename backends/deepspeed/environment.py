"""What DeepSpeed reads from its surroundings: accelerator, compiler, rendezvous, noise."""

from __future__ import annotations

import atexit
import io
import logging
import os
import shutil
import socket
import sys
import warnings
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from xtrain.contract import JSON, Availability, Job
from xtrain.errors import RequestError
from xtrain.launching.preflight import ADDRESS

from .apple import decide, on_mac, this_mac
from .nvme import INSTALL, find_libaio
from .operators import announce, folders, needed
from .stale_locks import clear_stale_locks

if TYPE_CHECKING:
    import torch

    from xtrain.spec.tree import Spec

LEAVE_SECONDS = 5
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""There where a driver of NVIDIA's, AMD's or WSL's is loaded."""
COLLECTIVES = {"cpu": "gloo", "cuda": "nccl", "mps": "gloo"}


def probe() -> Availability:
    try:
        installed = version("deepspeed")
    except PackageNotFoundError:
        return Availability(False, "deepspeed is not installed; pip install 'xtrain[deepspeed]'")
    prepare()
    if on_mac():
        return decide(this_mac())
    import torch

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        return Availability(
            True, f"DeepSpeed {installed} on {count} NVIDIA GPU{'s'[: count != 1]}", preference=40
        )
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        return Availability(
            False, f"DeepSpeed {installed} compiles an operator for the CPU and needs {' and '.join(missing)}"
        )
    return Availability(True, f"DeepSpeed {installed} on the CPU", preference=0)


def facts() -> dict[str, JSON]:
    """What `xtrain doctor` shows: the accelerator as DeepSpeed sees it, and what it can compile here."""
    prepare()
    with redirect_stdout(io.StringIO()):
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
    return {
        "accelerator": accelerator.device_name(),
        "communication": accelerator.communication_backend_name(),
        "bf16": "yes" if accelerator.is_bf16_supported() else "no",
        "fp16": "yes" if accelerator.is_fp16_supported() else "no",
        "compiler": shutil.which("g++") or "none: install g++",
        "ninja": shutil.which("ninja") or "none: pip install ninja",
        "NVMe offload (libaio)": "yes" if find_libaio() else f"no: {INSTALL}",
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR"),
    }


def sees_gpu() -> bool:
    """Whether a GPU may be used here, as far as that can be told without torch."""
    return on_mac() or any(Path(file).exists() for file in GPU_FILES)


def prepare() -> None:
    """Before deepspeed is first imported: choose the accelerator, find ninja, keep quiet."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "mps" if torch.backends.mps.is_available() else "cpu")
    tools = str(Path(sys.executable).parent)  # ninja is installed beside Python, whatever is active
    if tools not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([tools, os.environ.get("PATH", "")])
    _choose_interface()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")


def _choose_interface() -> None:
    """Talk through the interface that has this host's address, where one was given and none was chosen."""
    address = os.environ.get(ADDRESS)
    if not address:
        return
    with suppress(OSError):
        address = socket.gethostbyname(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            for collectives in COLLECTIVES.values():
                os.environ.setdefault(f"{collectives.upper()}_SOCKET_IFNAME", name)


def announce_compilation(spec: Spec) -> None:
    """Say so where DeepSpeed is about to compile for a while, in silence."""
    from deepspeed.git_version_info import installed_ops

    ready = [name for name, is_installed in installed_ops.items() if is_installed]
    announce(needed(spec, on_cpu=os.environ.get("DS_ACCELERATOR") == "cpu"), ready, say)


def device_of(job: Job) -> torch.device:
    """This process's own. Raises RequestError, on every rank of a host, where it has too few GPUs."""
    import torch

    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if job.local_world > gpus:
            raise RequestError(
                f"launch.processes: found {job.local_world} processes on this host, of whose GPUs this one "
                f"sees {gpus}; expected one GPU for each; use --nproc {gpus}, or CUDA_VISIBLE_DEVICES= for "
                "the CPU"
            )
        torch.cuda.set_device(job.local_rank)
        return torch.device("cuda", job.local_rank)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def collective_timeout(hang_minutes: float | None) -> timedelta:
    """How long a reduction waits for a rank: longer than the watchdog, which says more when it ends a run.

    At least torch's own half hour: building and loading are not watched. None: practically for ever.
    """
    if hang_minutes is None:
        return timedelta(days=365)
    return max(timedelta(minutes=30), timedelta(minutes=hang_minutes + 5))


def start_process_group(job: Job, device: torch.device, timeout: timedelta) -> None:
    """Join the job's processes; alone, be a job of one (DeepSpeed would look for MPI otherwise)."""
    import torch.distributed as dist

    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    if job.world == 1 and "RANK" not in os.environ:
        os.environ.update(alone)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # only now: importing deepspeed sets it
    if not dist.is_initialized():
        for folder in folders():
            clear_stale_locks(folder, job.world == job.local_world, say)
        with redirect_stdout(io.StringIO()):  # it prints that its operator was built
            backend = COLLECTIVES[device.type]
            # Told how many processes the host has, each would take 66 MiB of /dev/shm for inference and leave
            # them there (csrc/cpu/comm/shm.cpp); untold, stage 3 asks `numactl` at every reduction.
            os.environ.pop("LOCAL_SIZE", None)
            deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        # Not when an engine closes: DeepSpeed keeps groups of it for the next one.
        atexit.register(_leave_together)
    os.environ.setdefault("LOCAL_SIZE", str(job.local_world))


def say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def _leave_together() -> None:
    """Wait a little for the other ranks, then leave: gloo aborts a process whose peer is gone too early."""
    import torch.distributed as dist

    if dist.get_world_size() > 1:
        with suppress(RuntimeError):  # a peer that failed does not come
            dist.barrier(async_op=True).wait(timeout=timedelta(seconds=LEAVE_SECONDS))
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
