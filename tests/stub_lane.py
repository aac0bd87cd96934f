"""Stands in for `xtrain run` in the tests of comparisons: stub_lane.py BEHAVIOUR RUN_DIRECTORY."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # it is started as a script

from tests.sample_runs import sample_steps, write_run

behaviour, directory = sys.argv[1], Path(sys.argv[2])
if behaviour == "trains":
    write_run(directory)
elif behaviour == "trains-a-little-worse":
    write_run(directory, sample_steps(loss_factor=1.01))
elif behaviour == "refuses":
    print("starting\nerror: backend 'cuda' cannot run here\n  no GPU", file=sys.stderr)
    sys.exit(2)
elif behaviour == "fails":
    write_run(directory, status="failed", failure="the disk is full")
    sys.exit(1)
elif behaviour == "crashes":
    print("going well", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
elif behaviour == "leaves-nothing":
    pass
elif behaviour == "waits":
    directory.mkdir(parents=True)
    (directory / "pid").write_text(str(os.getpid()))
    time.sleep(60)
else:
    sys.exit(f"unknown behaviour {behaviour}")
