"""`xtrain launch`: a run on several hosts, started from here or written down for elsewhere."""

from __future__ import annotations

import secrets
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from xtrain import registry
from xtrain.choose import AUTO, most_able
from xtrain.errors import EXIT_DONE, RequestError
from xtrain.exchange.translation import elsewhere
from xtrain.launching.commands import (
    deepspeed_command,
    on_host,
    slurm_script,
    torchrun_commands,
    xtrain_commands,
)
from xtrain.launching.hostfile import read_hostfile
from xtrain.launching.remote import Remote
from xtrain.prepare import has_saved, run_directory
from xtrain.printable import printable
from xtrain.records.rundir import RunDirectory
from xtrain.request import Request, this_program
from xtrain.spec import load_spec


def on_slurm(request: Request, nodes: int | None, port: int) -> str:
    """The script for sbatch. RequestError where the spec or the numbers do not allow it."""
    world = _checked(request, request.processes)
    if nodes is None:
        raise RequestError("--slurm needs --nodes, the number of hosts")
    if world % nodes:
        raise RequestError(f"{world} processes on {nodes} nodes: expected a multiple of {nodes}; see --nproc")
    _require_folder(request)
    return slurm_script(replace(request, processes=world), nodes, port, Path.cwd())


def on_hosts(request: Request, hostfile: Path, port: int, launcher: str, show: bool, ssh: str | None) -> int:
    """Start the run on all hosts and wait, or `show` the commands; returns the exit code."""
    hosts = read_hostfile(hostfile)
    world = sum(host.slots for host in hosts)
    if request.processes not in (None, world):
        raise RequestError(
            f"--nproc {request.processes} contradicts {hostfile}, whose slots add up to {world}"
        )
    remote_shell = _words(ssh)
    _checked(request, world)
    _require_folder(request)
    request = replace(request, processes=world)
    if launcher == "deepspeed" and request.max_restarts:
        raise RequestError("--max-restarts: the deepspeed launcher restarts nothing; use --with xtrain")
    if launcher == "deepspeed" and not show:
        raise RequestError(
            "--with deepspeed: its launcher cannot be told from here to save and end; give --print and start "
            "what is printed yourself, or use --with xtrain"
        )
    start_id = secrets.token_hex(4)
    if launcher == "deepspeed":
        commands = {"any host": deepspeed_command(request, hosts, port, hostfile)}
    else:
        write = xtrain_commands if launcher == "xtrain" else torchrun_commands
        commands = write(request, hosts, port, start_id)
    if show:
        for host, command in commands.items():
            print(f"# on {host}\n{on_host(command, Path.cwd())}")
        return EXIT_DONE
    lines = {host: on_host([*command, "--leash"], Path.cwd()) for host, command in commands.items()}
    code = Remote(lines, remote_shell).wait()
    if code != EXIT_DONE and (run_directory(request) / "resolved.json").exists():
        again = _again(request, hostfile, port, launcher, ssh)
        print(f"on all hosts, go on with: {again}", file=sys.stderr, flush=True)
    return code


def _checked(request: Request, world: int | None) -> int:
    """The number of processes of a spec that can run: refused once and here, not by each host.

    What this machine lacks is not looked at: the hosts may be others, and each looks at itself.
    """
    resumes = request.resume is not None
    spec = load_spec(request.spec_path, request.overrides, world, resumes=resumes)
    world = world or spec.launch.processes
    name = most_able(spec, world) if request.backend == AUTO else request.backend
    load_spec(request.spec_path, request.overrides, world, elsewhere(registry.load(name)), resumes=resumes)
    return world


def _words(ssh: str | None) -> list[str] | None:
    """The command in the place of ssh, None for ssh itself."""
    if ssh is None:
        return None
    try:
        words = shlex.split(ssh)
    except ValueError as error:
        raise RequestError(f"--ssh: found {printable(ssh)!r}, which is no command: {error}") from error
    if not words:
        raise RequestError("--ssh: found nothing, expected a command such as `ssh -p 2222`; or leave it out")
    return words


def _require_folder(request: Request) -> None:
    if request.out is None and request.resume is None:
        raise RequestError("a run on several hosts needs --out, a folder that all of them see")


def _again(request: Request, hostfile: Path, port: int, launcher: str, ssh: str | None) -> str:
    """The command that goes on with the run on the same hosts."""
    directory = RunDirectory(run_directory(request))
    again = replace(request.going_on(directory.path, has_saved(directory)), processes=None)
    words: Sequence[str] = [*this_program(), "launch", *again.arguments()[1:], "--hosts", str(hostfile)]
    started = ["--port", str(port), "--with", launcher, *(["--ssh", ssh] if ssh else [])]
    return shlex.join([*words, *started])
