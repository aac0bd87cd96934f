"""No process of a launch outlives the one that started it, however that one ended.

A launch is a chain: launcher -> agent -> workers. Each link notices the end of the one above it: the
agent by a pipe that the launcher holds open, a worker by the kernel's word where there is such a thing,
and by looking at its parent's id everywhere.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from xtrain.errors import EXIT_FAILED

AGENT = "XTRAIN_AGENT_PID"
"""Tells a worker who its parent has to be: it may be gone before the worker can ask."""
LOOK_SECONDS = 0.5
_PR_SET_PDEATHSIG = 1
_watching = threading.Event()


def watch_parent() -> None:
    """From now on, end this process when its parent ends; at once if that has happened already.

    Whoever started it: our agent, torchrun, another launcher. Calling it again does nothing.
    """
    if _watching.is_set():
        return
    _watching.set()
    agent = os.environ.get(AGENT)
    parent = int(agent) if agent else os.getppid()
    if agent and sys.platform == "linux":
        # Only under our agent: the signal comes when the *thread* that started us ends, and only of the
        # agent do we know that it is the main one.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        _end_here()
    threading.Thread(target=_look_after, args=(parent,), name="watch-parent", daemon=True).start()


def _look_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    _end_here()


def _end_here() -> None:
    """Kill this process and all that it started, also what has left it where it leads a group of its own."""
    kill_groups(children(os.getpid()))
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def watch_lifeline(lifeline: int, folder: Path) -> None:
    """For the agent: when the other end of the pipe `lifeline` closes, end all workers and this process.

    `folder` is removed then, as the launcher no longer can.
    """

    def wait_for_the_end() -> None:
        while os.read(lifeline, 1):
            pass
        kill_groups(children(os.getpid()))
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(EXIT_FAILED)

    threading.Thread(target=wait_for_the_end, name="watch-lifeline", daemon=True).start()


def end_with_input() -> None:
    """From now on, when standard input ends, be told as by SIGTERM: whoever held the other end is gone."""

    def wait_for_the_end() -> None:
        while os.read(0, 64):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_the_end, name="leash", daemon=True).start()


def children(process: int, *, all_below: bool = False) -> list[int]:
    """Ids of the direct children, or of all that descend from it; none of a process that has ended."""
    try:
        return [child.pid for child in psutil.Process(process).children(recursive=all_below)]
    except psutil.NoSuchProcess:
        return []


def is_alive(process: int) -> bool:
    """False once it has ended, whether or not its parent knows."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def kill_groups(leaders: Iterable[int]) -> None:
    """SIGKILL to processes and to all that they started, as far as they are still there.

    Also to what has a group of its own, such as the compilers that ninja starts.
    """
    for leader in leaders:
        for process in (leader, *children(leader, all_below=True)):
            for kill in (os.killpg, os.kill):  # the second for one that does not lead its group yet
                with suppress(ProcessLookupError, PermissionError):
                    kill(process, signal.SIGKILL)
