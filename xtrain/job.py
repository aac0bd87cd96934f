"""Is this process one of a job that someone else started: torchrun, the deepspeed launcher, or srun?"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping

from xtrain.contract import Job
from xtrain.errors import RequestError

LAUNCHED = ("RANK", "WORLD_SIZE")
"""Set by torchrun and the deepspeed launcher."""
SLURM_PORTS = (20_000, 40_000)
"""The rendezvous port of a SLURM job is one of these, by its job id: the same on every node."""


def join(environ: MutableMapping[str, str]) -> Job | None:
    """This process's place in the job it belongs to; None when it stands alone.

    For SLURM the variables that torch.distributed reads are added to `environ`. Raises RequestError when
    they contradict each other.
    """
    if any(name in environ for name in LAUNCHED):
        return _launched(environ)
    if _in_srun_step(environ):
        _add_rendezvous(environ)
        return _launched(environ)
    return None


def _launched(environ: Mapping[str, str]) -> Job:
    rank, world = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    local_rank = _number(environ, "LOCAL_RANK")
    local_world = _number(environ, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environ else world
    if not (rank < world and local_rank < local_world <= world):
        raise RequestError(
            f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={world} and LOCAL_WORLD_SIZE={local_world} "
            "contradict each other; unset them, or start through torchrun, the deepspeed launcher or srun"
        )
    return Job(rank, local_rank, world, local_world)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdigit():
        found = f"found {text!r}" if name in environ else "it is not set"
        raise RequestError(
            f"{name} must be a whole number where {' or '.join(LAUNCHED)} is set, {found}; "
            "unset them all, or start through torchrun, the deepspeed launcher or srun"
        )
    return int(text)


def _in_srun_step(environ: Mapping[str, str]) -> bool:
    """Inside `srun` with several tasks; an sbatch script or an salloc shell has no step of its own."""
    step = environ.get("SLURM_STEP_ID", "")
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    return step.isdigit() and "SLURM_PROCID" in environ and tasks.isdigit() and int(tasks) > 1


def _add_rendezvous(environ: MutableMapping[str, str]) -> None:
    """torch.distributed's variables, from SLURM's."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or "127.0.0.1"
    first, last = SLURM_PORTS
    job_id = environ.get("SLURM_JOB_ID", "0")
    port = first + (int(job_id) if job_id.isdigit() else 0) % (last - first)
    environ["RANK"] = environ["SLURM_PROCID"]
    environ["WORLD_SIZE"] = environ["SLURM_STEP_NUM_TASKS"]
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "")
    environ["LOCAL_WORLD_SIZE"] = _tasks_here(environ)
    environ.setdefault("MASTER_ADDR", first_host(nodes))
    environ.setdefault("MASTER_PORT", str(port))


def _tasks_here(environ: Mapping[str, str]) -> str:
    """Tasks on this node, from e.g. SLURM_STEP_TASKS_PER_NODE=4(x2),3 and the node's number."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", environ["SLURM_STEP_NUM_TASKS"])
    counts: list[str] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        counts += [count] * int(times.rstrip(")") or 1)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else counts[0]


def first_host(nodes: str) -> str:
    """The first host of SLURM's compressed list: node[01-04,7],gpu3 -> node01."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\])?([^,]*)", nodes)
    if match is None:
        raise RequestError(f"SLURM's node list {nodes!r} cannot be read; set MASTER_ADDR to the first host")
    name, numbers, rest = match.group(1), match.group(2) or "", match.group(3)
    return name + re.split(r"[-,]", numbers)[0] + rest
