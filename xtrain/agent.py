"""`python -m xtrain.agent ARGUMENTS`: torch.distributed.run, quiet, and never outliving its parent."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from pathlib import Path

from xtrain.worker import FOLDER, watch_parent

AGENT_ENDING = "agent.json"


def main() -> int:
    """Returns 0 when all workers did; else leaves {rank, exitcode} of the first that failed."""
    watch_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes on what is meant for workers
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        ending = json.dumps({"rank": rank, "exitcode": failure.exitcode})
        (Path(os.environ[FOLDER]) / AGENT_ENDING).write_text(ending)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
