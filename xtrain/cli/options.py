"""Options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path

import click


def with_folders_above(context: click.Context, option: click.Parameter, path: Path | None) -> Path | None:
    """The names above tell a checkpoint from a run: `.` or `step-...`, said inside of a run, get theirs."""
    if path is None:
        return None
    whole = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
    hidden = "checkpoints" in whole.parts[-3:] and "checkpoints" not in path.parts
    return whole if hidden or path.name in ("", "..") else path


SPEC = click.argument("spec", type=click.Path(path_type=Path))
SET = click.option(
    "--set", "overrides", multiple=True, metavar="PATH=YAML", help="Override one key, e.g. train.steps=20."
)
BACKEND = click.option("--backend", default="auto", show_default=True, help="See `xtrain backends`.")
JSON = click.option("--json", "as_json", is_flag=True, help="As JSON on standard output.")
RESUME = click.option(
    "--resume",
    type=click.Path(path_type=Path),
    callback=with_folders_above,
    help="Go on with this run directory or checkpoint.",
)
ALLOW_CHANGED = click.option(
    "--allow-changed", is_flag=True, help="Resume although the spec describes another training."
)
STOP_AFTER = click.option(
    "--stop-after", type=click.IntRange(min=1), help="Stop, saved, after this many updates in all."
)
RESTARTS = click.option(
    "--max-restarts",
    type=click.IntRange(0, 1000),
    default=0,
    help="How often a run goes on by itself, from its last checkpoint, after a process has died.",
)
