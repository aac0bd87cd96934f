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
from collections.abc import Mapping
from pathlib import Path

from xtrain.errors import EXIT_DONE, EXIT_FAILED
from xtrain.supervise import AGENT, children, is_alive, kill_groups, watch_lifeline
from xtrain.worker import FOLDER, ending, process_ids, said_at

AGENT_ENDING = "agent.json"
GRACE_SECONDS = 5.0
"""Left to the others once a worker has failed: enough to write down how far they came."""
LOOK_SECONDS = 0.1


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
        rank = first_failure(folder, exit_codes, haste.failed_first)
        (folder / AGENT_ENDING).write_text(json.dumps({"rank": rank, "exitcode": exit_codes[rank]}))
        return EXIT_FAILED
    return EXIT_DONE


def first_failure(folder: Path, exit_codes: Mapping[int, int], failed_first: set[int]) -> int:
    """The rank whose failure is the cause of the others'.

    Of those that were seen to fail together it is one that a signal ended before it could say anything,
    or else the one that spoke first: its peers' errors, lost connections for the most part, follow
    within milliseconds. SIGTERM is how torchrun ends the others.
    """
    candidates = [rank for rank in exit_codes if rank in failed_first] or list(exit_codes)
    for rank in candidates:
        if exit_codes[rank] < 0 and exit_codes[rank] != -signal.SIGTERM and not ending(folder, rank):
            return rank
    return min(candidates, key=lambda rank: said_at(folder, rank))


class Haste(threading.Thread):
    """Sees which workers fail first, and ends those that are still there GRACE_SECONDS later.

    torchrun asks with SIGTERM, which a worker that waits for a dead peer cannot obey.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(name="haste", daemon=True)
        self.failed_first: set[int] = set()
        self._folder = folder

    def run(self) -> None:
        while not self.failed_first:
            time.sleep(LOOK_SECONDS)
            self.failed_first = self._failed()
        time.sleep(GRACE_SECONDS)
        kill_groups(children(os.getpid()))

    def _failed(self) -> set[int]:
        """Ranks that are gone without having said that all is well."""
        gone = [rank for rank, process in process_ids(self._folder).items() if not is_alive(process)]
        said = {rank: ending(self._folder, rank) for rank in gone}
        return {rank for rank, word in said.items() if word is None or not word.orderly}


if __name__ == "__main__":
    sys.exit(main())
