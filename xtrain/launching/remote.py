"""`xtrain launch --hosts`: one `xtrain run` per host through ssh, and one answer for all of them."""

from __future__ import annotations

import platform
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import FrameType

import psutil

from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_REQUEST, RequestError

SSH = ("ssh", "-o", "BatchMode=yes")
SIGNALLED = 128
UNREACHABLE = 255
"""ssh's own exit code."""
GRACE_SECONDS = 60.0
"""Left to the other hosts once one has ended badly, and again once they were told to end."""
LOOK_SECONDS = 0.2


class Remote:
    """The commands of all hosts. Each holds a line to here: where it ends, the host saves and ends."""

    def __init__(self, commands: Mapping[str, str], ssh: Sequence[str] | None) -> None:
        self._asked = 0
        self._running = {host: _start(host, command, ssh) for host, command in commands.items()}
        self._codes: dict[str, int] = {}

    def wait(self) -> int:
        """Until the last has ended; returns the exit code of the run."""
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            deadline = None
            while self._look():
                if deadline is None and any(self._codes.values()):
                    deadline = time.monotonic() + GRACE_SECONDS
                if deadline is not None and time.monotonic() > deadline:
                    self._ask()
                    deadline = time.monotonic() + GRACE_SECONDS
                time.sleep(LOOK_SECONDS)
        finally:
            for process in self._running.values():
                process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return verdict(self._codes.values())

    def _look(self) -> bool:
        """Whether some still run."""
        for host, process in list(self._running.items()):
            code = process.poll()
            if code is not None:
                del self._running[host]
                self._codes[host] = code
                if code not in (EXIT_DONE, EXIT_INTERRUPTED):
                    print(f"{host} {_how(code)}", file=sys.stderr, flush=True)
        return bool(self._running)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._ask()

    def _ask(self) -> None:
        """First to save and end, then to end."""
        self._asked += 1
        for process in self._running.values():
            if self._asked > 1:
                process.kill()
            elif process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()


def _how(code: int) -> str:
    """How the command of a host ended, for people."""
    if code == UNREACHABLE:
        return "cannot be reached through ssh, or was lost"
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _start(host: str, command: str, ssh: Sequence[str] | None) -> subprocess.Popen[bytes]:
    words = ["sh", "-c", command] if ssh is None and is_here(host) else [*(ssh or SSH), host, command]
    try:  # A session of its own: a terminal's Ctrl-C comes here, and from here by the line.
        return subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    except OSError as error:
        raise RequestError(f"{host}: cannot run {words[0]}: {error.strerror}; see --ssh") from error


def is_here(host: str) -> bool:
    """Whether this machine has that name or address: then no ssh is needed."""
    if host in ("localhost", platform.node()):
        return True
    with suppress(OSError):
        host = socket.gethostbyname(host)
    return any(one.address == host for some in psutil.net_if_addrs().values() for one in some)


def verdict(codes: Iterable[int]) -> int:
    """The exit code of a run from those of its hosts: a wrong request, a failure, what can go on."""
    bad = [code for code in codes if code != EXIT_DONE]
    for code in (EXIT_REQUEST, EXIT_FAILED, EXIT_INTERRUPTED):
        if code in bad:
            return code
    signalled = [code for code in bad if SIGNALLED < code < UNREACHABLE]
    return (signalled or [EXIT_FAILED])[0] if bad else EXIT_DONE
