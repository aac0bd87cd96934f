"""`xtrain check`, `translate`, `import`, `schema`: specs and the configs made of them; starts nothing."""

from __future__ import annotations

import json
from pathlib import Path

import click

from xtrain.cli.options import SET, SPEC
from xtrain.errors import EXIT_DONE, EXIT_REQUEST
from xtrain.printable import printable


@click.command()
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
            for note in result.notes:
                click.echo(f"note: {printable(note)}", err=True)
    raise SystemExit(EXIT_REQUEST if any(result.problems for result in results) else EXIT_DONE)


@click.command()
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
    for note in translation.notes(loaded, backend):
        click.echo(f"note: {note}", err=True)
    if origins and not as_json:
        click.echo(translation.as_table(settings, loaded))
    else:
        click.echo(json.dumps(translation.as_json(settings, loaded, origins), indent=2))


@click.command("import")
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


@click.command()
def schema() -> None:
    """Print the JSON Schema of a spec, for editors."""
    from xtrain.spec.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
