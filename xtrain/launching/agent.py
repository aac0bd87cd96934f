"""`python -m xtrain.launching.agent LIFELINE ORDER MODULE ARGUMENTS`: torch.distributed.run, quiet and hasty.

Quiet: what a worker says reaches people, torchrun's own report does not; the launcher tells what failed.
Hasty: when one worker has failed the others get seconds to end, not half a minute.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST
from xtrain.launching.supervise import AGENT, children, is_alive, kill_groups, watch_lifeline
from xtrain.launching.worker import FOLDER, ending, endings, process_ids, said_at
from xtrain.request import Hosts, this_python

AGENT_ENDING = "agent.json"
STOPPING = "stopping"
"""Left by the launcher when it was told to end the run: then nobody is started again."""
LOST = "{} does not answer: the host that all others meet at is lost, or out of reach from here"
ANSWER_SECONDS = 5.0
LINGER_SECONDS = 8.0
DEFAULTS = "PET_"
"""torchrun takes defaults for its options from variables that begin so: another job's, here."""
GRACE_SECONDS = 5.0
"""Left to the others once a worker has failed: enough to write down how far they came."""
WAKE_SECONDS = 10.0
"""At most, until the watchdog of a process that was stopped has looked, told, and ended it."""
LOOK_SECONDS = 0.1
CONSEQUENCES = (-signal.SIGTERM, -signal.SIGABRT)
"""How torchrun ends the others, and how libraries end a process whose peer is gone."""


@dataclass(frozen=True)
class Order:
    """What the agent of one host is to start."""

    processes: int
    """On this host."""
    max_restarts: int = 0
    hosts: Hosts | None = None
    """Its place among several hosts."""

    @classmethod
    def parse(cls, text: str) -> Order:
        read = json.loads(text)
        return cls(read["processes"], read["max_restarts"], Hosts(**read["hosts"]) if read["hosts"] else None)

    def json(self) -> str:
        return json.dumps(asdict(self))

    def options(self, folder: Path) -> list[str]:
        """For torchrun."""
        # Two signals are handled here.
        options = ["--nproc-per-node", str(self.processes), "--signals-to-handle", "SIGHUP,SIGQUIT"]
        options += ["--max-restarts", str(self.max_restarts), "--log-dir", str(folder / "torchrun")]
        if self.hosts is None:
            # Loopback: a laptop's own name often does not resolve.
            return [*options, "--standalone", "--nnodes", "1", "--local-addr", "127.0.0.1"]
        options += ["--nnodes", str(self.hosts.count), "--rdzv-backend", "c10d"]
        options += ["--rdzv-endpoint", self.hosts.meet, "--rdzv-id", self.hosts.start_id]
        if self.hosts.address:
            options += [
                "--rdzv-conf",
                f"is_host={int(self.hosts.serves)}",
                "--local-addr",
                self.hosts.address,
            ]
        return options


def main() -> int:
    """Returns 0 when all workers did; else leaves word of the first that failed, or of the host lost."""
    lifeline, order, *command = sys.argv[1:]
    folder = Path(os.environ[FOLDER])
    watch_lifeline(int(lifeline), folder)
    os.environ[AGENT] = str(os.getpid())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave_to_launcher)
    return _run(Order.parse(order), command, folder)


def _leave_to_launcher(number: int, frame: object) -> None:
    """A scheduler signals everybody; the launcher passes it on to the workers, and that is enough.

    A handler, because a signal that is ignored would be ignored in the workers too.
    """


def _run(order: Order, command: list[str], folder: Path) -> int:
    for name in [name for name in os.environ if name.startswith(DEFAULTS)]:
        del os.environ[name]
    # Else the workers of a restart meet in a store that still has the addresses of those that died.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError

    logging.disable(logging.ERROR)
    hosts = order.hosts
    haste = Haste(folder, order)
    haste.start()
    try:
        python, *options = this_python()
        torchrun = run.parse_args([*order.options(folder), "--no-python", python])
        # Unread: it would take a worker's --nproc for its own.
        torchrun.training_script_args = [*options, "-u", "-m", "xtrain.launching.worker", *command]
        run.run(torchrun)
    except ChildFailedError as failed:
        if _leave_if_lost(folder, hosts):
            return EXIT_FAILED
        exit_codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        rank = first_failure(folder, exit_codes, haste.ended)
        _leave(folder, rank=rank, exitcode=exit_codes[rank])
        if hosts and hosts.serves:
            time.sleep(LINGER_SECONDS)  # the others are to see that this host failed, and is not lost
    except RendezvousClosedError:
        return _leave(folder, failed="the run failed on another host, which says why")
    except RendezvousError as error:
        where = hosts.meet if hosts else "this host"
        return _leave(folder, lost=f"{LOST.format(where)} ({type(error).__name__})")
    else:
        return EXIT_DONE
    return EXIT_FAILED


def _leave(folder: Path, **word: object) -> int:
    (folder / AGENT_ENDING).write_text(json.dumps(word))
    return EXIT_FAILED


def _leave_if_lost(folder: Path, hosts: Hosts | None) -> bool:
    """Whether all meet at another host, and that does not answer."""
    if hosts is None or hosts.serves or _answers(hosts.meet):
        return False
    _leave(folder, lost=LOST.format(hosts.meet))
    return True


def _answers(meet: str) -> bool:
    host, _, port = meet.rpartition(":")
    try:
        socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def first_failure(folder: Path, exit_codes: Mapping[int, int], ended_by_us: Collection[int]) -> int:
    """The rank whose failure is the cause of the others'.

    It is one that died without a word, or else the one that spoke first: its peers' errors, lost
    connections for the most part, follow within milliseconds.
    """
    spoke = [rank for rank in exit_codes if ending(folder, rank)]
    silent = [rank for rank in exit_codes if rank not in spoke and rank not in ended_by_us]
    silent.sort(key=lambda rank: exit_codes[rank] == -signal.SIGTERM)
    cause = [rank for rank in silent if exit_codes[rank] not in CONSEQUENCES]
    return (cause or sorted(spoke, key=lambda rank: said_at(folder, rank)) or silent or list(exit_codes))[0]


class Haste(threading.Thread):
    """Ends the workers that are still there GRACE_SECONDS after the first has failed.

    torchrun asks with SIGTERM, which a worker that waits for a dead peer cannot obey. With restarts that
    happens again; what would fail again in the same way, or was asked to end, is not restarted. Where all
    meet at a host that is lost, this process ends too: torchrun would wait for an answer as long as TCP does.
    """

    def __init__(self, folder: Path, order: Order) -> None:
        super().__init__(name="haste", daemon=True)
        self.ended: set[int] = set()
        """Ranks."""
        self._folder = folder
        self._hosts = order.hosts
        self._restarts_left = order.max_restarts
        self._past: set[int] = set()
        """Processes of attempts that failed."""

    def run(self) -> None:
        while True:
            while (failed := self._failed()) is None:
                time.sleep(LOOK_SECONDS)
            self._end_attempt(failed)

    def _end_attempt(self, failed: int) -> None:
        over = time.monotonic() + GRACE_SECONDS
        processes, workers = process_ids(self._folder), children(os.getpid())
        if self._restarts_left > 0:
            self._prevent_restart(failed, workers)
        lost = _leave_if_lost(self._folder, self._hosts)
        if self._restarts_left > 0 and not lost:
            self._announce_restart(failed)
        time.sleep(max(0.0, over - time.monotonic()))
        _wake(processes.values())
        self.ended = {rank for rank, process in processes.items() if is_alive(process)}
        kill_groups(worker for worker in workers if is_alive(worker))
        if lost:
            os._exit(EXIT_FAILED)
        self._past |= set(processes.values())
        self._restarts_left -= 1

    def _prevent_restart(self, failed: int, workers: Sequence[int]) -> None:
        """End here where a request was refused, which it would be again, or the run was asked to end."""
        refused = [word.rank for word in endings(self._folder) if word.code == EXIT_REQUEST]
        if refused or (self._folder / STOPPING).exists():
            rank = (refused or [failed])[0]
            _leave(self._folder, rank=rank, exitcode=EXIT_REQUEST if refused else -signal.SIGTERM)
            kill_groups(workers)
            os._exit(EXIT_FAILED)

    def _announce_restart(self, failed: int) -> None:
        word = ending(self._folder, failed)
        reason = word.message.splitlines()[-1] if word and word.message else "it died without a word"
        left = f"{self._restarts_left} restart{'s'[: self._restarts_left != 1]} left"
        print(
            f"note: rank {failed} failed: {reason}; all start again from the last checkpoint ({left})",
            file=sys.stderr,
            flush=True,
        )

    def _failed(self) -> int | None:
        """A rank that is gone without a word, or else one that said so, on its way out or stuck there."""
        everybody = process_ids(self._folder).items()
        current = {rank: process for rank, process in everybody if process not in self._past}
        words = {rank: ending(self._folder, rank) for rank in current}
        silent = [rank for rank, word in words.items() if word is None and not is_alive(current[rank])]
        spoke = [rank for rank, word in words.items() if word is not None and not word.orderly]
        return next(iter(silent + spoke), None)


def _wake(processes: Iterable[int]) -> None:
    """Continue those that were stopped: their watchdogs still can tell where they stood."""
    stopped = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(process).status() == psutil.STATUS_STOPPED:
                stopped.append(process)
                os.kill(process, signal.SIGCONT)
    over = time.monotonic() + WAKE_SECONDS
    while any(is_alive(process) for process in stopped) and time.monotonic() < over:
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
