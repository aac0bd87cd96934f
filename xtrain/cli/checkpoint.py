"""`xtrain checkpoint ...`: look at checkpoints, check them, clear up, and carry weights elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from xtrain.cli.options import JSON, SET, with_folders_above
from xtrain.errors import EXIT_DONE, EXIT_FAILED

UNVERIFIED = "all there, and its values cannot be verified: format version 1 has no hashes"
PATH = click.argument("path", type=click.Path(path_type=Path), callback=with_folders_above)


@click.group()
def checkpoint() -> None:
    """List, inspect, verify, prune, export, import checkpoints. PATH is a run directory or a checkpoint."""


@checkpoint.command("ls")
@PATH
@JSON
def list_them(path: Path, as_json: bool) -> None:
    """List the checkpoints at PATH, those kept aside too, and whether they look whole."""
    from tabulate import tabulate

    from xtrain.checkpoints.inventory import entry, found_at
    from xtrain.records.summary import format_bytes

    entries = [entry(one) for one in found_at(path)]
    if as_json:
        click.echo(json.dumps([one.as_json() for one in entries], indent=2))
        return
    rows = [
        (
            one.step,
            format_bytes(one.bytes),
            f"{one.backend} x{one.world}" if one.backend else "-",
            one.wrong or ("kept aside" if one.aside else "looks whole"),
            one.path,
        )
        for one in entries
    ]
    click.echo(tabulate(rows, headers=["step", "size", "written by", "state", "path"], tablefmt="simple"))


@checkpoint.command()
@PATH
@click.option("--tensors", is_flag=True, help="Every tensor with its shape too.")
@JSON
def show(path: Path, tensors: bool, as_json: bool) -> None:
    """Show what the checkpoint at PATH holds: the newest valid one of a run directory. Checks every byte."""
    from xtrain.checkpoints.inventory import details, newest
    from xtrain.checkpoints.render import rendered

    found = details(newest(path))
    click.echo(json.dumps(found, indent=2) if as_json else rendered(found, tensors))


@checkpoint.command()
@PATH
@JSON
def verify(path: Path, as_json: bool) -> None:
    """Hold every byte at PATH against the hashes; exit code 1 when something is damaged."""
    from xtrain.checkpoints.inventory import damage, found_at, has_hashes

    found = [(one, damage(one)) for one in found_at(path, aside=False)]
    if as_json:
        click.echo(json.dumps({str(one.path): wrong for one, wrong in found}, indent=2))
    else:
        for one, wrong in found:
            if wrong:
                click.echo("\n".join(wrong), err=True)
            else:
                click.echo(f"{one.path}: {'whole' if has_hashes(one) else UNVERIFIED}")
    raise SystemExit(EXIT_FAILED if any(wrong for _, wrong in found) else EXIT_DONE)


@checkpoint.command()
@PATH
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many of the newest stay.")
@click.option("--aside", is_flag=True, help="Delete those that were kept aside too.")
@JSON
def prune(path: Path, keep: int, aside: bool, as_json: bool) -> None:
    """Delete all but the newest checkpoints, and the best, of the run directory PATH.

    Damaged ones do not count, and stay until --aside.
    """
    from xtrain.checkpoints.inventory import clear

    gone = [str(one) for one in clear(path, keep, aside)]
    if as_json:
        click.echo(json.dumps(gone, indent=2))
        return
    for one in gone:
        click.echo(f"deleted {one}")
    click.echo(f"{len(gone)} deleted")


@checkpoint.command()
@PATH
@click.option("--to", "form", type=click.Choice(["safetensors", "hf", "ds-universal"]), required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make; must be new.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True)
@JSON
def export(path: Path, form: Any, out: Path, dtype: Any, as_json: bool) -> None:
    """Write what is at PATH for other programs.

    The weights in one merged file, or as a folder that Hugging Face loads (it is loaded, and must compute
    what ours does); or weights and moments as a universal checkpoint of DeepSpeed's.
    """
    from xtrain.checkpoints.export import export as write
    from xtrain.checkpoints.inventory import newest
    from xtrain.records.summary import format_bytes

    found = newest(path)
    written = write(found, form, dtype, out)
    if as_json:
        facts = {"path": str(written.path), "bytes": written.bytes, "difference": written.difference}
        click.echo(json.dumps({**facts, "step": found.step, "notes": list(written.notes)}, indent=2))
        return
    click.echo(f"wrote step {found.step} to {written.path}: {format_bytes(written.bytes)}, {dtype}")
    if written.difference is not None:
        click.echo(
            f"loaded by transformers: largest difference of a logit from ours {written.difference:.1e}"
        )
    for note in written.notes:
        click.echo(f"not carried: {note}")


@checkpoint.command("import")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--from", "form", type=click.Choice(["hf", "deepspeed", "ds-universal"]), required=True)
@click.option("--spec", "spec_path", required=True, type=click.Path(path_type=Path), help="Of the training.")
@SET
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory to make.")
@JSON
def import_(
    source: Path, form: Any, spec_path: Path, overrides: tuple[str, ...], out: Path, as_json: bool
) -> None:
    """Make a checkpoint of ours from another program's folder SOURCE, for runs of the spec to go on from.

    Weights by name, and from DeepSpeed the optimizer's moments too. Pickles are read as data: one that holds
    anything but tensors, numbers and what DeepSpeed is known to put there is refused.
    """
    from xtrain.checkpoints.foreign import import_state
    from xtrain.request import Request
    from xtrain.spec import load_spec

    found = import_state(source, form, load_spec(spec_path, overrides), out)
    if as_json:
        facts = {
            "path": str(found.checkpoint.path),
            "step": found.checkpoint.step,
            "notes": list(found.notes),
        }
        click.echo(json.dumps(facts, indent=2))
        return
    click.echo(f"wrote step {found.checkpoint.step} to {found.checkpoint.path}")
    for note in found.notes:
        click.echo(f"note: {note}")
    again = Request(spec_path, overrides=overrides).resume_command(found.directory, has_saved=True)
    click.echo(f"go on with: {again}")
