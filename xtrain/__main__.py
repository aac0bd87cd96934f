"""`python -m xtrain` is `xtrain`."""

from __future__ import annotations

import sys

from xtrain.cli import main
from xtrain.collection import collect_later

TRAINS = "run"
"""The command whose process trains."""


def start() -> None:
    """The command line, as a process of its own."""
    if TRAINS in sys.argv[1:2]:
        collect_later()
    main()


if __name__ == "__main__":
    start()
