"""Is this process one of a job that someone else started: torchrun, the deepspeed launcher, or srun?"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from xtrain.contract import Job
from xtrain.errors import RequestError

LAUNCHED = ("RANK", "WORLD_SIZE")
"""Set by torchrun and the deepspeed launcher."""
LOCAL_WORLD = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""What torchrun and the deepspeed launcher call the number of processes on this host."""
SLURM_PORTS = range(10_000, 30_000)
"""One is the rendezvous port of a SLURM step; below those that Linux gives to outgoing connections."""
STEPS_APART = 997
"""Keeps the ports of a job's steps, which may run at the same time, from those of the next jobs."""


def join(environ: MutableMapping[str, str]) -> Job | None:
    """This process's place in the job it belongs to; None when it stands alone.

    For SLURM the variables that torch.distributed reads are added to `environ`; a MASTER_ADDR or
    MASTER_PORT that is there stays. Raises RequestError when variables are missing or contradict each other.
    """
    if any(name in environ for name in LAUNCHED):
        return _launched(environ)
    if _in_srun_step(environ):
        return _srun(environ)
    return None


def _launched(environ: Mapping[str, str]) -> Job:
    local_world = next((name for name in LOCAL_WORLD if name in environ), "WORLD_SIZE")
    return _place(environ, "RANK", "LOCAL_RANK", "WORLD_SIZE", local_world)


def _place(environ: Mapping[str, str], *names: str) -> Job:
    """From variables for rank, local rank, world and local world that fit together."""
    rank, local_rank, world, local_world = (_number(environ, name) for name in names)
    if not (rank < world and local_rank < local_world <= world):
        found = ", ".join(f"{name}={environ[name]}" for name in dict.fromkeys(names))
        raise RequestError(
            f"{found} contradict each other: a rank must be below its world, and no host can have more "
            "processes than the job; unset them, or start through torchrun, the deepspeed launcher or srun"
        )
    return Job(rank, local_rank, world, local_world)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdecimal():
        found = f"found {text!r}" if name in environ else "it is not set"
        others = " and ".join(other for other in (*LAUNCHED, "SLURM_PROCID") if other in environ)
        raise RequestError(
            f"{name} must be a whole number where {others} say that this process is part of a job, {found}; "
            "unset them all, or start through torchrun, the deepspeed launcher or srun"
        )
    return int(text)


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    """Inside `srun` with several tasks; an sbatch script or an salloc shell has no step with tasks."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    return "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and tasks.isdecimal() and int(tasks) > 1


def _srun(environ: MutableMapping[str, str]) -> Job:
    """The place that SLURM's variables give, and torch.distributed's variables made from them."""
    here = {**environ, "SLURM_STEP_TASKS_PER_NODE": str(_tasks_here(environ))}
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")
    job = _place(here, *names)
    made = {
        "RANK": str(job.rank),
        "LOCAL_RANK": str(job.local_rank),
        "WORLD_SIZE": str(job.world),
        "LOCAL_WORLD_SIZE": str(job.local_world),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(environ.get("SLURM_STEP_NODELIST", "")),
        "MASTER_PORT": environ.get("MASTER_PORT") or _port(environ),
    }
    environ.update(made)  # all or, where something cannot be read, nothing
    return job


def _port(environ: Mapping[str, str]) -> str:
    spread = _number(environ, "SLURM_JOB_ID") + STEPS_APART * _number(environ, "SLURM_STEP_ID")
    return str(SLURM_PORTS[spread % len(SLURM_PORTS)])


def _tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks on this node: node 2 of SLURM_STEP_TASKS_PER_NODE=4(x2),3 has 3."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise RequestError(
                f"SLURM_STEP_TASKS_PER_NODE={text!r} cannot be read, expected e.g. 4(x2),3; "
                "start through srun, or set RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE"
            )
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID")
    if node >= len(counts):
        raise RequestError(
            f"SLURM_NODEID={node} contradicts SLURM_STEP_TASKS_PER_NODE={text}, which has "
            f"{len(counts)} nodes; start through srun"
        )
    return counts[node]


def first_host(nodes: str) -> str:
    """The first host of SLURM's compressed list: node[01-04,7],gpu3 -> node01."""
    first = re.match(r"(?:[^,\[\]]|\[\w[^\[\]]*\])+(?=,|$)", nodes)
    if first is None:
        raise RequestError(
            f"SLURM_STEP_NODELIST={nodes!r} cannot be read, expected e.g. node[01-04,7],gpu3; "
            "set MASTER_ADDR to the first host"
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
