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
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import psutil

from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, RequestError
from xtrain.launching.agent import AGENT_ENDING, STOPPING, Order
from xtrain.launching.supervise import children, kill_groups
from xtrain.launching.worker import FOLDER, ending, endings, process_ids
from xtrain.measure.cgroup import Kills, Verdict
from xtrain.request import Hosts, this_python
from xtrain.signals import exit_code, too_early

SIGNALLED = 128
PROCESSES_PER_CORE = 4
ALWAYS_ALLOWED = 64
"""Processes, whatever the cores: a host's accelerators may outnumber what is left of its cores."""
KILLED: dict[Verdict, str] = {
    "yes": "out of memory: the system counted it",
    "likely": "probably out of memory: such a kill was counted on this machine",
    "unknown": "often: out of memory; this system does not tell",
    "no": "not for memory: the system counted no such kill",
}
"""By whom, as far as the system tells."""


@dataclass(frozen=True)
class Ended:
    """How a launch ended: an exit code, and what to tell people."""

    code: int
    message: str
    killed_for_memory: Verdict | None = None
    """Where a process was ended by SIGKILL: whether by the system, because memory was short."""

    @property
    def signalled(self) -> bool:
        """Whether a signal to the launcher ended it, and nothing was saved for it."""
        return self.code > SIGNALLED


def start_workers(
    arguments: Sequence[str],
    processes: int,
    environ: Mapping[str, str],
    module: str = "xtrain",
    max_restarts: int = 0,
    hosts: Hosts | None = None,
) -> Ended:
    """Run `python -m MODULE ARGUMENTS` in `processes` processes that form one job; wait for all.

    With `hosts` they are this host's share of a job, and other hosts start the others. After a worker has
    died all are started again, at most `max_restarts` times.

    Ctrl-C and SIGTERM are passed on once to the workers, which finish their step and save; a second
    Ctrl-C ends them where they stand. Workers do not outlive this process, however it ends. Raises
    RequestError when they cannot be started. Call it from the main thread.
    """
    _check(processes)
    with tempfile.TemporaryDirectory(prefix="xtrain-", ignore_cleanup_errors=True) as name:
        environ = {**environ, **_threads(environ, processes), FOLDER: name}
        order = Order(processes, max_restarts, hosts)
        launch = Launch(Path(name), order, [module, *arguments], environ)
        with launch.supervised():
            launch.agent.wait()
        return launch.verdict()


def _check(processes: int) -> None:
    most = max(ALWAYS_ALLOWED, PROCESSES_PER_CORE * cores())
    if processes > most:
        raise RequestError(
            f"{processes} processes were asked for, and this machine has {cores()} cores; at most {most} "
            "are started on it. Ask for fewer with --nproc or launch.processes"
        )
    if find_spec("torch") is None:
        raise RequestError(
            f"more than one process needs torch.distributed.run, and {sys.executable} has no torch; "
            "install it with `pip install torch`"
        )


def cores() -> int:
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return min(physical, len(os.sched_getaffinity(0))) if sys.platform == "linux" else physical


def _threads(environ: Mapping[str, str], processes: int) -> dict[str, str]:
    """Cores shared out: threads that outnumber them spin, and a step takes many times as long."""
    if "OMP_NUM_THREADS" in environ:
        return {}
    threads = max(1, cores() // processes)
    _say(f"{processes} processes on {cores()} cores: OMP_NUM_THREADS={threads} each, as it is not set")
    return {"OMP_NUM_THREADS": str(threads)}


class Launch:
    """The agent, its workers, and what was asked of them meanwhile."""

    def __init__(
        self, folder: Path, order: Order, command: Sequence[str], environ: Mapping[str, str]
    ) -> None:
        self._folder = folder
        self._processes = order.processes
        self._world = order.processes * (order.hosts.count if order.hosts else 1)
        self._asked: signal.Signals | None = None
        self._left_at_once = False
        self._kills = Kills.now()
        agents_end, self._lifeline = os.pipe()
        self.agent = subprocess.Popen(
            [*this_python(), "-m", "xtrain.launching.agent", str(agents_end), order.json(), *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            pass_fds=[agents_end],
            start_new_session=True,  # a terminal's Ctrl-C comes here, and from here to the workers
        )
        os.close(agents_end)

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Signals are passed on; when it is left, nobody is."""
        before = {number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._end_all()
            os.close(self._lifeline)
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._asked is None:
            self._asked = signal.Signals(number)
            (self._folder / STOPPING).touch()
            self._pass_on(self._asked)
        elif number == signal.SIGINT:
            self._left_at_once = True
            self._end_all()

    def _pass_on(self, number: signal.Signals) -> None:
        workers = children(self.agent.pid)
        for worker in workers:
            try:
                os.kill(worker, number)
            except ProcessLookupError:
                continue
        if not workers:
            self._end_all()

    def _end_all(self) -> None:
        """The agent first: it must not start others, nor report these as failed."""
        workers = set(self._silent_workers())
        if self.agent.returncode is None:
            workers |= set(children(self.agent.pid))
            kill_groups([self.agent.pid])
        kill_groups(workers)

    def _silent_workers(self) -> list[int]:
        """Those that have not said that they end; what they started may still be there."""
        return [
            process for rank, process in process_ids(self._folder).items() if not ending(self._folder, rank)
        ]

    def verdict(self) -> Ended:
        """One, from what the workers, and the agent that watched them, left behind."""
        if self._left_at_once:
            message = "the workers were ended at once, as asked; what was saved before stands"
            return Ended(exit_code(signal.SIGINT), message)
        words = endings(self._folder)
        if len(words) == self._processes and all(word.orderly for word in words):
            # Also where a library crashed in a process that was done: all is written, nothing was lost.
            interrupted = any(word.code == EXIT_INTERRUPTED for word in words)
            return Ended(EXIT_INTERRUPTED if interrupted else EXIT_DONE, "")
        file = self._folder / AGENT_ENDING
        if not file.exists():
            return self._without_report()
        found = json.loads(file.read_text())
        if "lost" in found:
            return Ended(EXIT_INTERRUPTED, found["lost"])
        if "failed" in found:
            return Ended(EXIT_FAILED, found["failed"])
        return self._failure(int(found["rank"]), int(found["exitcode"]))

    def _failure(self, rank: int, code: int) -> Ended:
        """Of the worker that failed first, in its own words if it had any."""
        word = ending(self._folder, rank)
        if word is not None and not word.orderly:
            code = word.code  # whatever became of the process on its way out
        who = f"rank {rank} of {self._world}"
        if self._asked is not None and code in (-self._asked, exit_code(self._asked)):
            return self._too_early(self._asked)
        if code < 0:
            verdict = self._kills.explain(Kills.now()) if code == -signal.SIGKILL else None
            reason = f" ({KILLED[verdict]})" if verdict else ""
            return Ended(
                EXIT_FAILED, f"{who} was killed by {_name(-code)}{reason}; the others were ended", verdict
            )
        if word is None or not word.message:
            return Ended(code, f"{who} ended with exit code {code}; the others were ended")
        return Ended(code, f"{who} failed\n{word.message}" if "\n" in word.message else word.message)

    def _without_report(self) -> Ended:
        code = self.agent.returncode
        if code == EXIT_DONE:  # a module that leaves by os._exit says nothing
            return Ended(EXIT_DONE, "")
        if self._asked is not None:
            return self._too_early(self._asked)
        how = f"was killed by {_name(-code)}" if code < 0 else f"ended with exit code {code}"
        return Ended(EXIT_FAILED, f"the process that watches the workers {how}; the workers were ended")

    @staticmethod
    def _too_early(number: int) -> Ended:
        return Ended(exit_code(number), too_early(number))


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
