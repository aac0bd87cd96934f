"""What holds for a whole session: the order of its files, and Ctrl-C."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """A shell starts what it puts in the background without Ctrl-C, and children inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: processes that share the files (`make test`) then end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
