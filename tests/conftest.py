"""What holds for a whole session: its compiler, the order of its files, its garbage, and how it is ended."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

COMPILER = Path(__file__).parent / "compiler" / "g++"


def pytest_configure() -> None:
    """A shell starts what it puts in the background without Ctrl-C, and children inherit that.

    SIGTERM is as Ctrl-C: mounts, namespaces and processes of the test that runs are cleared away.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    compile_quickly()


def compile_quickly() -> None:
    """DeepSpeed's operators take minutes; made for tests, they are kept apart from those of real runs."""
    if "TORCH_EXTENSIONS_DIR" not in os.environ and "CXX" not in os.environ and shutil.which("g++"):
        os.environ["CXX"] = str(COMPILER)
        os.environ["TORCH_EXTENSIONS_DIR"] = f"{sys.prefix}/torch_extensions-{version('torch')}"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: processes that share the files (`make test`) then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Libraries and tests stay: no garbage collection need look at them again."""
    gc.collect()
    gc.freeze()
