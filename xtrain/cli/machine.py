"""`xtrain backends`, `doctor` and `plan`: what can run here, is it right, will it fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from xtrain.cli.modes import require_one_mode
from xtrain.cli.options import BACKEND, JSON, SET
from xtrain.errors import EXIT_DONE, EXIT_FAILED, RequestError
from xtrain.plan.formulas import FORMULAS


@click.command()
@JSON
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


@click.command()
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
@JSON
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


SIZE = click.IntRange(1, 10**9)
SHAPE = ("params", "gpus", "nodes", "batch", "seq", "hidden", "layers")
MODES = {
    "SPEC": {"spec", "overrides", "backend", "gpus", "nodes", "device_memory", "as_json"},
    "--formula": {
        "formula",
        "params",
        "gpus",
        "nodes",
        "batch",
        "seq",
        "hidden",
        "layers",
        "heads",
        "bytes_",
        "as_json",
    },
    "--advise": {
        "advise",
        "params",
        "gpus",
        "nodes",
        "device_memory",
        "batch",
        "seq",
        "hidden",
        "layers",
        "as_json",
    },
    "SPEC --advise": {"spec", "overrides", "advise", "gpus", "nodes", "device_memory", "as_json"},
}
"""What `plan` can be asked, and the parameters of each question."""


@click.command()
@click.argument("spec", required=False, type=click.Path(path_type=Path))
@SET
@click.option("--backend", help="Whose engine.  [default: one device, or what runs on that many]")
@click.option("--formula", help=f"One of {', '.join(FORMULAS)}.")
@click.option("--advise", is_flag=True, help="How to divide a training over a cluster, and why.")
@click.option("--params", type=float, default=7e9, show_default=True, help="Parameters, e.g. 7e9.")
@click.option("--gpus", type=SIZE, help="Per node.  [default: 1, or launch.processes]")
@click.option("--nodes", type=SIZE, default=1, show_default=True)
@click.option("--device-memory", help="Of one device, such as 24GiB; 80GB with --advise.")
@click.option("--batch", type=SIZE, default=4, show_default=True, help="Sequences.")
@click.option("--seq", type=SIZE, default=2048, show_default=True, help="Tokens.")
@click.option("--hidden", type=SIZE, default=4096, show_default=True)
@click.option("--layers", type=SIZE, default=32, show_default=True)
@click.option("--heads", type=SIZE, default=32, show_default=True)
@click.option("--bytes", "bytes_", type=click.Choice(["2", "4"]), default="2", help="Of a number.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on standard output, in bytes.")
@click.pass_context
def plan(
    context: click.Context,
    /,
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
    --device-memory what fits; with --advise too, the advice for its model, sequences and micro-batch.
    """
    from xtrain.plan import command as room

    asked = {
        "SPEC": spec is not None and not advise,
        "--formula": formula is not None,
        "--advise": advise and spec is None,
        "SPEC --advise": advise and spec is not None,
    }
    require_one_mode(context, MODES, asked)
    memory = "80GB" if device_memory is None else device_memory
    cluster: Any = {"gpus": gpus or 1, "nodes": nodes, "device_memory": memory}
    if spec is not None and advise:
        click.echo(room.advise_spec(spec, overrides, as_json, **cluster))
        return
    if spec is not None:
        world = None if gpus is None and nodes == 1 else (gpus or 1) * nodes
        click.echo(room.answer_spec(spec, overrides, world, backend, device_memory, as_json))
        return
    click.echo(room.answer(formula, as_json, **cluster, **question))
