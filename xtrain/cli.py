"""The command line: options in, exit codes out. Commands import what they need when they run."""

from __future__ import annotations

import io
import json
import math
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xtrain import __version__
from xtrain.cli_checkpoint import checkpoint
from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST, RequestError, XtrainError
from xtrain.launching.worker import launched
from xtrain.plan.formulas import FORMULAS
from xtrain.signals import Interrupted, exit_code

if TYPE_CHECKING:
    from xtrain.report.comparison import Comparison

LAUNCHERS = ("xtrain", "torchrun", "deepspeed")
Command = TypeVar("Command", bound=click.Command)

SPEC = click.argument("spec", type=click.Path(path_type=Path))
SET = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=YAML", help="Override one key, e.g. train.steps=20."
)
RESTARTS = click.option(
    "--max-restarts",
    type=click.IntRange(0, 1000),
    default=0,
    help="How often a run goes on by itself, from its last checkpoint, after a process has died.",
)
BACKEND = click.option("--backend", default="auto", show_default=True, help="See `xtrain backends`.")


class Edge(click.Group):
    """The one place where errors become messages and exit codes. A traceback means a bug of ours."""

    def invoke(self, context: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a name is no reason to fail
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if launched():
            return super().invoke(context)  # one of several workers: its worker.py tells the launcher
        try:
            return super().invoke(context)
        except (XtrainError, Interrupted) as error:
            prefix = "" if isinstance(error, Interrupted) else "error: "
            click.echo(f"{prefix}{error}", err=True)
            raise SystemExit(error.exit_code) from None
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise SystemExit(exit_code(signal.SIGINT)) from None  # as shells say it; click would say 1


@click.group(cls=Edge, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="xtrain")
def main() -> None:
    """One strict YAML spec for training transformers; the same training on every backend."""


@main.command()
@SPEC
@BACKEND
@SET
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory; must be new.  [default: runs/NAME-N]"
)
@click.option("--nproc", type=click.IntRange(min=1), help="Processes; overrides launch.processes.")
@click.option(
    "--resume", type=click.Path(path_type=Path), help="Go on with this run directory or checkpoint."
)
@click.option("--allow-changed", is_flag=True, help="Resume although the spec describes another training.")
@click.option("--stop-after", type=click.IntRange(min=1), help="Stop, saved, after this many updates in all.")
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


@main.command()
@SPEC
@BACKEND
@SET
@click.option("--out", type=click.Path(path_type=Path), help="Run directory, new, that all hosts see.")
@click.option(
    "--resume", type=click.Path(path_type=Path), help="Go on with this run directory or checkpoint."
)
@click.option("--allow-changed", is_flag=True, help="Resume although the spec describes another training.")
@click.option("--stop-after", type=click.IntRange(min=1), help="Stop, saved, after this many updates in all.")
@RESTARTS
@click.option("--hosts", "hostfile", type=click.Path(path_type=Path), help="A line `host slots=N` for each.")
@click.option("--slurm", is_flag=True, help="Print a script for sbatch instead.")
@click.option("--nodes", type=click.IntRange(min=1), help="Hosts, with --slurm.")
@click.option("--nproc", type=click.IntRange(min=1), help="Processes on all hosts together.")
@click.option("--print", "show", is_flag=True, help="Print the command of each host, start nothing.")
@click.option("--with", "launcher", type=click.Choice(LAUNCHERS), default="xtrain", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=29400, show_default=True)
@click.option("--ssh", metavar="COMMAND", help="Instead of `ssh -o BatchMode=yes`; also for this host.")
def launch(
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

    request = Request(spec, backend, out, nproc, overrides, resume, allow_changed, stop_after, max_restarts)
    if slurm == (hostfile is not None):
        raise RequestError("where to? Give either --hosts FILE or --slurm")
    if hostfile is None:
        click.echo(on_slurm(request, nodes, port), nl=False)
        return
    raise SystemExit(on_hosts(request, hostfile, port, launcher, show, ssh))


@main.command()
@click.argument("specs", nargs=-1, required=True, metavar="SPEC...", type=click.Path(path_type=Path))
@click.option("--backend", help="Also ask this backend whether it can honour the spec.")
@click.option("--world", type=click.IntRange(min=1), help="Processes to check for.")
@SET
@click.option("--json", "as_json", is_flag=True, help="Problems as JSON on standard output.")
def check(
    specs: tuple[Path, ...], backend: str | None, world: int | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Read each SPEC and report every problem in it; starts nothing."""
    from xtrain.check import check_file

    results = [check_file(spec, overrides, backend, world) for spec in specs]
    if as_json:
        click.echo(json.dumps([result.as_json() for result in results], indent=2))
    else:
        for result in results:
            click.echo(str(result), err=bool(result.problems))
            for warning in result.warnings:
                click.echo(f"warning: {warning}", err=True)
    raise SystemExit(EXIT_REQUEST if any(result.problems for result in results) else EXIT_DONE)


@main.command()
@SPEC
@click.option("--world", type=click.IntRange(min=1), help="Processes; overrides launch.processes.")
@click.option("--backend", help="Whose config.  [default: the backend that has one]")
@SET
@click.option("--origins", is_flag=True, help="Each key with the spec key, default or rule it comes from.")
@click.option("--standalone", is_flag=True, help="For a script without xtrain: optimizer and schedule too.")
@click.option("--json", "as_json", is_flag=True, help="With --origins: as JSON on standard output.")
def translate(
    spec: Path,
    world: int | None,
    backend: str | None,
    overrides: tuple[str, ...],
    origins: bool,
    standalone: bool,
    as_json: bool,
) -> None:
    """Print the config that a backend is given for SPEC, every value concrete; starts nothing."""
    from xtrain.exchange import translate as translation

    loaded, settings = translation.translate_file(spec, overrides, backend, world, standalone)
    if origins and not as_json:
        click.echo(translation.as_table(settings, loaded))
    else:
        click.echo(json.dumps(translation.as_json(settings, loaded, origins), indent=2))


@main.command("import")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write the spec here; must be new.")
@click.option("--arguments", type=click.Path(path_type=Path), help="TrainingArguments that fill each auto.")
@click.option("--world", type=click.IntRange(min=1), help="Processes that CONFIG is for.")
@click.option("--backend", help="Whose config it is.  [default: the backend that has one]")
def import_config(
    config: Path, out: Path | None, arguments: Path | None, world: int | None, backend: str | None
) -> None:
    """Make a spec from CONFIG: a ds_config, or Hugging Face TrainingArguments, as JSON.

    What was decided and what could not be carried over is said on standard error and in the spec.
    """
    from xtrain.exchange import imports

    found = imports.import_file(config, arguments, world, backend)
    text = imports.as_yaml(found, config)
    for note in imports.notes(found):
        click.echo(note, err=True)
    if out is None:
        click.echo(text, nl=False)
    else:
        imports.write(text, out)


@main.command()
def schema() -> None:
    """Print the JSON Schema of a spec, for editors."""
    from xtrain.spec.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON on standard output.")
def backends(as_json: bool) -> None:
    """List every registered backend: usable here or not, and why."""
    from tabulate import tabulate

    from xtrain.registry import survey

    found = survey()
    if as_json:
        listed = {name: {"usable": a.usable, "reason": a.reason} for name, a in found.items()}
        click.echo(json.dumps(listed, indent=2))
        return
    rows = [(name, "yes" if a.usable else "no", a.reason) for name, a in found.items()]
    click.echo(tabulate(rows, headers=["backend", "usable", "reason"], tablefmt="simple"))


@main.command()
@SPEC
@click.option("--backends", "names", required=True, help="Comma-separated, e.g. cpu,deepspeed,deepspeed:2.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="Folder for the comparison; must be new."
)
@click.option("--repeats", type=click.IntRange(1, 100), default=3, show_default=True, help="Runs per lane.")
@click.option("--vary", "variations", multiple=True, metavar="PATH=A,B", help="A lane per value too.")
@click.option("--ladder", "climb", is_flag=True, help="A lane per memory technique, claimed and measured.")
@SET
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on standard output.")
def compare(
    spec: Path,
    names: str,
    out: Path,
    repeats: int,
    variations: tuple[str, ...],
    climb: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train SPEC on several backends, in fresh processes that take turns, and put them side by side.

    A lane is a backend, or BACKEND:N for N processes. Leaves report.html, report.md and report.json in --out.
    """
    from xtrain.compare import compare as run_lanes
    from xtrain.lanes import parse_lanes
    from xtrain.spec import load_spec
    from xtrain.variations import ladder, varied

    if climb and variations:
        raise RequestError("--ladder and --vary: expected one of them, each makes lanes of its own")
    given = parse_lanes(names.split(","))
    loaded = load_spec(spec, overrides)  # a broken spec is refused once, not by every lane
    lanes, places = ladder(given, loaded) if climb else (varied(given, variations), [])
    for changed in {lane.overrides for lane in lanes if lane.overrides}:
        load_spec(spec, (*overrides, *changed))
    comparison = run_lanes(spec, lanes, out, overrides, repeats, places)
    _show(comparison, out, as_json)
    raise SystemExit(comparison.exit_code)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="[NAME=]RUN_DIR...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the report.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on standard output.")
def report(runs: tuple[str, ...], out: Path, as_json: bool) -> None:
    """Put finished runs side by side, wherever they were made: those of `run`, and whole comparisons.

    Runs of one NAME are repeats of one lane. Leaves report.html, report.md and report.json in --out.
    """
    from xtrain.report.merge import merge

    _show(merge(runs, out), out, as_json)


def _show(comparison: Comparison, out: Path, as_json: bool) -> None:
    from xtrain.report.text import render_terminal

    if as_json:
        click.echo(json.dumps(comparison.model_dump(mode="json"), indent=2))
    else:
        click.echo(render_terminal(comparison))
    click.echo(f"report in {out}", err=True)


@main.command()
@click.option(
    "--grad-check",
    "checked",
    metavar="SPEC",
    type=click.Path(path_type=Path),
    help="Hold this spec's gradients, on --backend, against bare torch on the CPU.",
)
@BACKEND
@SET
@click.option("--tolerance", type=click.FloatRange(min=0.0), help="Largest relative error.  [default: 0.001]")
@click.option("--json", "as_json", is_flag=True, help="As JSON on standard output.")
def doctor(
    checked: Path | None, backend: str, overrides: tuple[str, ...], tolerance: float | None, as_json: bool
) -> None:
    """Tell everything about this machine and its backends; or check gradients of a spec on it.

    With --grad-check it exits with 1 when a gradient is wrong.
    """
    from xtrain import doctor as room

    if tolerance is not None and (checked is None or not math.isfinite(tolerance)):
        raise RequestError(f"--tolerance: found {tolerance}, expected a finite number beside --grad-check")
    if checked is None:
        diagnosis = room.diagnose()
        click.echo(json.dumps(diagnosis.as_json(), indent=2) if as_json else room.render(diagnosis))
        return
    from xtrain.gradcheck import TOLERANCE, check_gradients

    result = check_gradients(checked, overrides, backend, TOLERANCE if tolerance is None else tolerance)
    report = json.dumps(room.grad_check_json(result), indent=2) if as_json else room.render_grad_check(result)
    click.echo(report)
    raise SystemExit(EXIT_DONE if result.right else EXIT_FAILED)


@main.command()
@click.argument("spec", required=False, type=click.Path(path_type=Path))
@SET
@click.option("--backend", help="Whose engine.  [default: one device, or what runs on that many]")
@click.option("--formula", help=f"One of {', '.join(FORMULAS)}.")
@click.option("--advise", is_flag=True, help="How to divide a training over a cluster, and why.")
@click.option("--params", type=float, default=7e9, show_default=True, help="Parameters, e.g. 7e9.")
@click.option("--gpus", type=click.IntRange(min=1), help="Per node.  [default: 1, or launch.processes]")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--device-memory", help="Of one device, such as 24GiB; 80GB with --advise.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Sequences.")
@click.option("--seq", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens.")
@click.option("--hidden", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option("--layers", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--heads", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--bytes", "bytes_", type=click.Choice(["2", "4"]), default="2", help="Of a number.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on standard output, in bytes.")
def plan(
    spec: Path | None,
    overrides: tuple[str, ...],
    backend: str | None,
    formula: str | None,
    advise: bool,
    device_memory: str | None,
    gpus: int | None,
    nodes: int,
    as_json: bool,
    **question: Any,
) -> None:
    """Estimate before training: the memory of SPEC, or of any size, and how to divide it over a cluster.

    With SPEC: bytes by category at the peak of a step, the ladder of techniques, ZeRO's stages, and with
    --device-memory what fits.
    """
    from xtrain.plan import command as room

    if spec is not None:
        if formula is not None or advise:
            raise RequestError("xtrain plan: expected one of SPEC, --formula and --advise")
        world = None if gpus is None and nodes == 1 else (gpus or 1) * nodes
        click.echo(room.answer_spec(spec, overrides, world, backend, device_memory, as_json))
        return
    click.echo(
        room.answer(
            formula,
            advise,
            as_json,
            device_memory="80GB" if device_memory is None else device_memory,
            gpus=gpus or 1,
            nodes=nodes,
            **question,
        )
    )


main.add_command(checkpoint)
