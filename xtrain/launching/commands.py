"""What each host of a run has to start: by xtrain itself, torchrun, the deepspeed launcher, or SLURM."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xtrain.launching.hostfile import Host
from xtrain.launching.preflight import ADDRESS
from xtrain.prepare import run_of
from xtrain.request import Hosts, Request, this_program

WARN_SECONDS = 120
"""Before its time is over SLURM tells a job so: enough to finish a step and save."""


def xtrain_commands(
    request: Request, hosts: Sequence[Host], port: int, start_id: str
) -> dict[str, list[str]]:
    """By host: `xtrain run` with its place among the others."""
    meet = f"{hosts[0].name}:{port}"
    return {
        host.name: [
            *this_program(),
            *replace(request, hosts=Hosts(len(hosts), meet, start_id, host.name)).arguments(),
        ]
        for host in hosts
    }


def torchrun_commands(
    request: Request, hosts: Sequence[Host], port: int, start_id: str
) -> dict[str, list[str]]:
    """By host: torchrun, which restarts too, but has messages and exit codes of its own."""
    common = ["--nnodes", str(len(hosts)), "--nproc-per-node", str(hosts[0].slots)]
    common += ["--max-restarts", str(request.max_restarts), "--rdzv-backend", "c10d"]
    common += ["--rdzv-endpoint", f"{hosts[0].name}:{port}", "--rdzv-id", start_id]
    # Without the second, workers of a restart meet in a store with the addresses of those that died.
    variables = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    # Else torchrun takes --nproc for a short form of two options of its own.
    program = ["-m", "--", "xtrain", *replace(request, max_restarts=0).arguments()]
    return {
        host.name: [
            *variables,
            f"{ADDRESS}={host.name}",
            *[sys.executable, "-m", "torch.distributed.run", *common],
            *["--rdzv-conf", f"is_host={int(host is hosts[0])}", "--local-addr", host.name],
            *program,
        ]
        for host in hosts
    }


def deepspeed_command(request: Request, hosts: Sequence[Host], port: int, hostfile: Path) -> list[str]:
    """One for all hosts: DeepSpeed's launcher reads the same hostfile and uses ssh itself."""
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    meeting = ["--master_addr", hosts[0].name, "--master_port", str(port)]
    # Else it adds --local_rank to the command line.
    program = ["--no_local_rank", "--module", "xtrain", *replace(request, max_restarts=0).arguments()]
    return [launcher, "--hostfile", str(hostfile), *meeting, *program]


def on_host(command: Sequence[str], folder: Path) -> str:
    """A line for a host's shell that starts `command` in the same folder as here."""
    return f"cd {shlex.quote(str(folder))} && exec {shlex.join(command)}"


def slurm_script(request: Request, nodes: int, port: int, folder: Path) -> str:
    """For sbatch: a task per node, each an xtrain that starts its share; interrupted, it is queued again."""
    out = request.out or run_of(request.resume)
    command = shlex.join([*this_program(), *replace(request, out=None, resume=None).arguments()])
    places = {"--resume": request.resume, "--out": request.out}
    first = [word for name, place in places.items() if place for word in (name, str(place))]
    return SCRIPT.format(
        name=re.sub(r"[^\w.-]", "-", request.spec_path.stem),
        nodes=nodes,
        warn=WARN_SECONDS,
        folder=shlex.quote(str(folder)),
        first=shlex.join(first),
        out=shlex.quote(str(out)),
        port=port,
        command=command.replace("'", "'\\''"),
    )


SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@{warn}
#SBATCH --requeue
#SBATCH --open-mode=append

cd {folder} || exit 1
WHERE=({first})
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] && [ -e {out}/resolved.json ]; then
  WHERE=(--resume {out})  # queued again: from the last checkpoint
fi
export MEET=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):{port}
export START=$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}
srun --kill-on-bad-exit=0 bash -c '{command} \\
  "$@" --nodes {nodes} --meet "$MEET" --id "$START" --address "$SLURMD_NODENAME"' xtrain "${{WHERE[@]}}"
code=$?
if [ $code -eq 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit $code
"""
