"""`xtrain compare` and `xtrain report`: lanes and finished runs, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xtrain.cli.options import SET, SPEC
from xtrain.errors import RequestError

if TYPE_CHECKING:
    from xtrain.report.comparison import Comparison


@click.command()
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
    lanes = ladder(given, loaded) if climb else varied(given, variations)
    for changed in {lane.overrides for lane in lanes if lane.overrides}:
        load_spec(spec, (*overrides, *changed))
    comparison = run_lanes(spec, lanes, out, overrides, repeats)
    _show(comparison, out, as_json)
    raise SystemExit(comparison.exit_code)


@click.command()
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
