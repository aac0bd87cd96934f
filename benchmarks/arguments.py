"""What the command lines of the programs have in common: a bad word ends them before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.overhead_report import WARMUP_STEPS

RESULTS = Path(__file__).parent / "results"
FEWEST_STEPS = WARMUP_STEPS + 3
"""Of which the last one and some before it are traced: fewer would leave none to measure."""


def at_least(smallest: int) -> Callable[[str], int]:
    """An argument that is a whole number."""

    def number(text: str) -> int:
        if int(text) < smallest:
            raise argparse.ArgumentTypeError(f"found {text}, expected {smallest} or more")
        return int(text)

    return number


def folder(text: str) -> Path:
    """An argument that is a folder to write to; it is made here, not after minutes of measuring."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make {text}: {error.strerror}") from error
    return path


def add_out(parser: argparse.ArgumentParser) -> None:
    """`--out`, where every program's results go."""
    parser.add_argument("--out", type=folder, default=str(RESULTS), help="folder for the results")
