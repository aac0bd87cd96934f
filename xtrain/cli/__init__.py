"""The command line: options in, exit codes out. Commands import what they need when they run."""

from __future__ import annotations

import errno
import io
import signal
import sys
from contextlib import redirect_stderr
from typing import Any

import click

from xtrain import __version__
from xtrain.cli.checkpoint import checkpoint
from xtrain.cli.compare import compare, report
from xtrain.cli.machine import backends, doctor, plan
from xtrain.cli.specs import check, import_config, schema, translate
from xtrain.cli.streams import Overheard
from xtrain.cli.train import launch, run
from xtrain.errors import EXIT_FAILED, XtrainError
from xtrain.launching.worker import launched
from xtrain.signals import Interrupted, exit_code

COMMANDS = (
    run,
    launch,
    check,
    translate,
    import_config,
    schema,
    backends,
    compare,
    report,
    doctor,
    plan,
    checkpoint,
)


FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Edge(click.Group):
    """The one place where errors become messages and exit codes. A traceback means a bug of ours."""

    def invoke(self, context: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a name is no reason to fail
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with redirect_stderr(Overheard(sys.stderr)):
            return self._invoke(context)

    def _invoke(self, context: click.Context) -> Any:
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
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            click.echo(f"error: cannot write: {error.strerror}", err=True)
            raise SystemExit(EXIT_FAILED) from None


@click.group(cls=Edge, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="xtrain")
def main() -> None:
    """One strict YAML spec for training transformers; the same training on every backend."""


for _command in COMMANDS:
    main.add_command(_command)
