"""Hosts and their slots, in the format that DeepSpeed and others read: a line `host slots=N` each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from xtrain.errors import RequestError
from xtrain.printable import printable

LARGEST_BYTES = 1 << 20
_LINE = re.compile(r"(?P<name>[\w.-]+)\s+slots=(?P<slots>[1-9]\d{0,5})")


@dataclass(frozen=True)
class Host:
    name: str
    """A name or an address that every host can reach."""
    slots: int
    """Processes on it."""


def read_hostfile(path: Path) -> list[Host]:
    """Every host, in order; `#` begins a comment. RequestError names the line that cannot be used."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise RequestError(f"hostfile {path} is larger than {LARGEST_BYTES} bytes")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise RequestError(
            f"cannot read hostfile {path}: {error.strerror}; expected a file with a line such as "
            "`gpu1 slots=8` for each host"
        ) from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        host = _host(f"{path}, line {number}", text)
        if host.name in hosts:
            raise RequestError(
                f"{path}, line {number}: host {host.name} stands twice; give it all its slots once"
            )
        hosts[host.name] = host
    if not hosts:
        raise RequestError(f"hostfile {path} names no host; expected a line such as `gpu1 slots=8` for each")
    _require_equal_slots(path, list(hosts.values()))
    return list(hosts.values())


def _host(place: str, text: str) -> Host:
    match = _LINE.fullmatch(text)
    if match is None:
        raise RequestError(
            f"{place}: found {printable(text)!r}, expected a host and its number of processes, "
            "such as `gpu1 slots=8`"
        )
    return Host(match["name"], int(match["slots"]))


def _require_equal_slots(path: Path, hosts: list[Host]) -> None:
    first = hosts[0]
    for host in hosts:
        if host.slots != first.slots:
            raise RequestError(
                f"hostfile {path}: {first.name} has slots={first.slots}, {host.name} slots={host.slots}; "
                f"expected the same everywhere: slots={min(first.slots, host.slots)} works for both"
            )
