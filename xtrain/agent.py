"""`python -m xtrain.agent LIFELINE PROCESSES MODULE ARGUMENTS`: torch.distributed.run, quiet and hasty.

Quiet: what a worker says reaches people, torchrun's own report does not; the launcher tells what failed.
Hasty: when one worker has failed the others get seconds to end, not half a minute.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from xtrain.errors import EXIT_DONE, EXIT_FAILED
from xtrain.supervise import AGENT, children, is_alive, kill_groups, watch_lifeline
from xtrain.worker import FOLDER, ending, process_ids, said_at

AGENT_ENDING = "agent.json"
DEFAULTS = "PET_"
"""torchrun takes defaults for its options from variables that begin so: another job's, here."""
GRACE_SECONDS = 5.0
"""Left to the others once a worker has failed: enough to write down how far they came."""
WAKE_SECONDS = 3.0
"""More than a watchdog takes to look."""
LOOK_SECONDS = 0.1
CONSEQUENCES = (-signal.SIGTERM, -signal.SIGABRT)
"""How torchrun ends the others, and how libraries end a process whose peer is gone."""


def main() -> int:
    """Returns 0 when all workers did; else leaves {rank, exitcode} of the first that failed."""
    lifeline, processes, *command = sys.argv[1:]
    folder = Path(os.environ[FOLDER])
    watch_lifeline(int(lifeline), folder)
    os.environ[AGENT] = str(os.getpid())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave_to_launcher)
    return _run(processes, command, folder)


def _leave_to_launcher(number: int, frame: object) -> None:
    """A scheduler signals everybody; the launcher passes it on to the workers, and that is enough.

    A handler, because a signal that is ignored would be ignored in the workers too.
    """


def _run(processes: str, command: list[str], folder: Path) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in [name for name in os.environ if name.startswith(DEFAULTS)]:
        del os.environ[name]
    logging.disable(logging.ERROR)
    options = ["--standalone", "--nnodes", "1", "--nproc-per-node", processes, "--max-restarts", "0"]
    # Loopback: a laptop's own name often does not resolve. Two signals are handled above.
    options += ["--local-addr", "127.0.0.1", "--signals-to-handle", "SIGHUP,SIGQUIT"]
    options += ["--log-dir", str(folder / "torchrun")]
    haste = Haste(folder)
    haste.start()
    try:
        torchrun = run.parse_args([*options, "-m", "xtrain.worker"])
        torchrun.training_script_args = command  # unread: it would take a worker's --nproc for its own
        run.run(torchrun)
    except ChildFailedError as failed:
        exit_codes = {rank: failure.exitcode for rank, failure in failed.failures.items()}
        rank = first_failure(folder, exit_codes, haste.ended)
        (folder / AGENT_ENDING).write_text(json.dumps({"rank": rank, "exitcode": exit_codes[rank]}))
        return EXIT_FAILED
    return EXIT_DONE


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

    torchrun asks with SIGTERM, which a worker that waits for a dead peer cannot obey.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(name="haste", daemon=True)
        self.ended: set[int] = set()
        """Ranks."""
        self._folder = folder

    def run(self) -> None:
        while not self._one_failed():
            time.sleep(LOOK_SECONDS)
        time.sleep(GRACE_SECONDS)
        processes = process_ids(self._folder)
        _wake(processes.values())
        self.ended = {rank for rank, process in processes.items() if is_alive(process)}
        kill_groups(children(os.getpid()))

    def _one_failed(self) -> bool:
        """It said so, on its way out or stuck there, or it is gone without a word."""
        for rank, process in process_ids(self._folder).items():
            word = ending(self._folder, rank)
            if not (word.orderly if word else is_alive(process)):
                return True
        return False


def _wake(processes: Iterable[int]) -> None:
    """Continue those that were stopped: their watchdogs still can tell where they stood."""
    stopped = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(process).status() == psutil.STATUS_STOPPED:
                stopped.append(process)
                os.kill(process, signal.SIGCONT)
    if stopped:
        time.sleep(WAKE_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
