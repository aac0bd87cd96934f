"""`xtrain run` and `xtrain launch`: train, on this host or on several."""

from __future__ import annotations

from pathlib import Path

import click

from xtrain.cli.modes import require_one_mode
from xtrain.cli.options import ALLOW_CHANGED, BACKEND, RESTARTS, RESUME, SET, SPEC, STOP_AFTER

LAUNCHERS = ("xtrain", "torchrun", "deepspeed")
EITHER = {
    *("spec", "backend", "overrides", "out", "resume", "allow_changed", "stop_after", "max_restarts"),
    *("nproc", "port", "show"),
}
MODES = {"--hosts": {*EITHER, "hostfile", "launcher", "ssh"}, "--slurm": {*EITHER, "slurm", "nodes"}}
"""Where `launch` starts a run, and the parameters of each way."""


@click.command()
@SPEC
@BACKEND
@SET
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory; must be new.  [default: runs/NAME-N]"
)
@click.option("--nproc", type=click.IntRange(min=1), help="Processes; overrides launch.processes.")
@RESUME
@ALLOW_CHANGED
@STOP_AFTER
@RESTARTS
@click.option("--nodes", type=click.IntRange(min=1), help="Hosts; `xtrain launch` writes these four.")
@click.option("--meet", metavar="HOST:PORT", help="Where the hosts meet.")
@click.option("--id", "start_id", metavar="WORD", help="The same on all hosts, new for every start.")
@click.option("--address", help="This host's, as the others reach it.")
@click.option("--leash", is_flag=True, hidden=True, help="Save and end when standard input ends.")
def run(
    spec: Path,
    backend: str,
    overrides: tuple[str, ...],
    out: Path | None,
    nproc: int | None,
    resume: Path | None,
    allow_changed: bool,
    stop_after: int | None,
    max_restarts: int,
    nodes: int | None,
    meet: str | None,
    start_id: str | None,
    address: str | None,
    leash: bool,
) -> None:
    """Train SPEC, here or on the processes it asks for.

    Exits with 0 when done or stopped as asked, 1 when it failed, 2 when the request was wrong, 75 when it was
    interrupted, saved and can be resumed.
    """
    from xtrain.launching.supervise import end_with_input
    from xtrain.request import Request, hosts_of
    from xtrain.run import run as train

    if leash:
        end_with_input()
    hosts = hosts_of(nodes, meet, start_id, address)
    request = Request(
        spec, backend, out, nproc, overrides, resume, allow_changed, stop_after, max_restarts, hosts
    )
    raise SystemExit(train(request))


@click.command()
@SPEC
@BACKEND
@SET
@click.option("--out", type=click.Path(path_type=Path), help="Run directory, new, that all hosts see.")
@RESUME
@ALLOW_CHANGED
@STOP_AFTER
@RESTARTS
@click.option("--hosts", "hostfile", type=click.Path(path_type=Path), help="A line `host slots=N` for each.")
@click.option("--slurm", is_flag=True, help="Print a script for sbatch instead.")
@click.option("--nodes", type=click.IntRange(min=1), help="Hosts, with --slurm.")
@click.option("--nproc", type=click.IntRange(min=1), help="Processes on all hosts together.")
@click.option("--print", "show", is_flag=True, help="Print the command of each host, start nothing.")
@click.option("--with", "launcher", type=click.Choice(LAUNCHERS), default="xtrain", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=29400, show_default=True)
@click.option("--ssh", metavar="COMMAND", help="Instead of `ssh -o BatchMode=yes`; also for this host.")
@click.pass_context
def launch(
    context: click.Context,
    /,
    spec: Path,
    backend: str,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    allow_changed: bool,
    stop_after: int | None,
    max_restarts: int,
    hostfile: Path | None,
    slurm: bool,
    nodes: int | None,
    nproc: int | None,
    show: bool,
    launcher: str,
    port: int,
    ssh: str | None,
) -> None:
    """Train SPEC on several hosts: through ssh, or by commands and scripts written for you.

    All hosts need the same checkout, environment and folders. Exit codes are those of `xtrain run`.
    """
    from xtrain.launching.several import on_hosts, on_slurm
    from xtrain.request import Request

    require_one_mode(context, MODES, {"--hosts": hostfile is not None, "--slurm": slurm})
    request = Request(spec, backend, out, nproc, overrides, resume, allow_changed, stop_after, max_restarts)
    if hostfile is None:
        click.echo(on_slurm(request, nodes, port), nl=False)
        return
    raise SystemExit(on_hosts(request, hostfile, port, launcher, show, ssh))
