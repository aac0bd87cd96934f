"""Two hosts on one machine: network namespaces with an address each, and a cable between them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class TwoHosts:
    """Namespaces by address; processes in one reach the other through the veth pair alone."""

    namespaces: dict[str, str]
    enter: Path
    """A program in ssh's place: `enter HOST COMMAND`."""

    @property
    def addresses(self) -> list[str]:
        return list(self.namespaces)

    def processes(self, address: str) -> list[int]:
        """Everything that runs on that host."""
        return [int(word) for word in _ip("netns", "pids", self.namespaces[address]).split()]

    def lose(self, address: str) -> None:
        """The host is gone, with all that ran on it."""
        _ip("-n", self.namespaces[address], "link", "set", "cable", "down")
        self.kill(address)

    def kill(self, address: str) -> None:
        for process in self.processes(address):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def _ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=30).stdout


def missing() -> str | None:
    """What keeps this machine from having two hosts."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "needs Linux and the `ip` command (package iproute2)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    probe = f"xtrain-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "del", probe)
    except subprocess.CalledProcessError as error:
        return f"cannot make network namespaces here: {error.stderr.strip()}"
    return None


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Up, until left; nothing of them stays, neither processes nor namespaces."""
    if reason := missing():
        pytest.skip(f"two hosts: {reason}")
    names = [f"xtrain-{os.getpid()}-{letter}" for letter in "ab"]
    addresses = ["10.77.31.1", "10.77.31.2"]
    enter = folder / "enter.sh"
    cases = "".join(f"{a}) namespace={n};; " for a, n in zip(addresses, names, strict=True))
    enter.write_text(
        f'#!/bin/sh\ncase "$1" in {cases}esac\nshift\nexec ip netns exec "$namespace" sh -c "$*"\n'
    )
    enter.chmod(0o755)
    hosts = TwoHosts(dict(zip(addresses, names, strict=True)), enter)
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for address, name in hosts.namespaces.items():
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for address, name in hosts.namespaces.items():
            with suppress(subprocess.CalledProcessError):
                hosts.kill(address)
                _ip("netns", "del", name)
