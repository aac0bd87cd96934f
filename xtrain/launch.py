"""Starting the processes of a run on this host, and answering for them until the last has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from xtrain.agent import AGENT_ENDING
from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from xtrain.worker import FOLDER, endings, process_ids


@dataclass(frozen=True)
class Ended:
    """How a launch ended: an exit code of ours, and what to tell people."""

    code: int
    message: str


def start_workers(
    arguments: Sequence[str], processes: int, environ: Mapping[str, str], module: str = "xtrain"
) -> Ended:
    """Run `python -m MODULE ARGUMENTS` in `processes` processes that form one job; wait for all.

    Ctrl-C and SIGTERM are passed on to the workers, which finish their step and save; a second Ctrl-C
    ends them where they stand. Workers do not outlive this process, however it ends.
    """
    with tempfile.TemporaryDirectory(prefix="xtrain-") as name:
        folder = Path(name)
        command = [sys.executable, "-m", "xtrain.agent", "--standalone", "--nproc_per_node", str(processes)]
        agent = subprocess.Popen(
            [*command, "-m", module, *arguments],
            env={**environ, **_threads(environ, processes), FOLDER: name},
            start_new_session=True,  # a terminal's Ctrl-C comes here, and from here to the workers
        )
        with _passing_on_signals(agent, folder):
            agent.wait()
        return _ended(folder, agent.returncode)


def _threads(environ: Mapping[str, str], processes: int) -> dict[str, str]:
    """Cores shared out: threads that outnumber them spin, and a step takes many times as long."""
    if "OMP_NUM_THREADS" in environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}


@contextmanager
def _passing_on_signals(agent: subprocess.Popen[bytes], folder: Path) -> Iterator[None]:
    interrupts = 0

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        leave_at_once = interrupts > 1
        _signal_all(process_ids(folder), signal.SIGKILL if leave_at_once else signal.SIGTERM)
        if leave_at_once or not process_ids(folder):
            _signal_all([agent.pid], signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if agent.poll() is None:
            _signal_all([*process_ids(folder), agent.pid], signal.SIGKILL)


def _signal_all(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        try:
            os.kill(process, number)
        except ProcessLookupError:
            continue


def _ended(folder: Path, agent_code: int) -> Ended:
    """One verdict from what the workers, and the agent that watched them, left behind."""
    said = endings(folder)
    failed = [ending for ending in said if ending.code not in (EXIT_DONE, EXIT_INTERRUPTED)]
    if failed:
        return Ended(failed[0].code, failed[0].message)
    if agent_code != 0:
        return Ended(EXIT_FAILED, _silent_death(folder, agent_code))
    interrupted = any(ending.code == EXIT_INTERRUPTED for ending in said)
    return Ended(EXIT_INTERRUPTED if interrupted else EXIT_DONE, "")


def _silent_death(folder: Path, agent_code: int) -> str:
    """A worker that could not say why it ended."""
    file = folder / AGENT_ENDING
    if not file.exists():
        return f"the launcher's agent ended with code {agent_code}"
    ending = json.loads(file.read_text())
    code = int(ending["exitcode"])
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    reason = " (often: out of memory)" if code == -signal.SIGKILL else ""
    return f"rank {ending['rank']} {how}{reason}"
