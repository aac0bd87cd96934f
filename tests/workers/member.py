"""A worker for the tests of launching: `python -m member RECORDS BEHAVIOUR [RANK]`.

It joins its job, sums something over all ranks unless it only waits, writes what it saw to
RECORDS/RANK.json and behaves as told; with RANK only that rank does, and the others wait in a reduction
for it.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from xtrain.launching.job import join
from xtrain.launching.worker import register

records, behaviour = Path(sys.argv[1]), sys.argv[2]
place = join(os.environ)
assert place is not None
job = place
register(job.rank)
chosen = len(sys.argv) < 4 or int(sys.argv[3]) == job.rank


def write(**facts: object) -> None:
    partial = records / f".{job.rank}"
    partial.write_text(json.dumps({"rank": job.rank, "world": job.world, "pid": os.getpid(), **facts}))
    partial.replace(records / f"{job.rank}.json")


def finish_and_save(number: int, frame: FrameType | None) -> None:
    write(saved=signal.Signals(number).name)
    sys.exit(75)


# What needs no other rank begins without torch: importing it takes seconds.
if behaviour == "waits-before-training":
    write()
    time.sleep(60)
elif behaviour == "saves-when-asked":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, finish_and_save)
    write(ready=True)
    time.sleep(60)
elif behaviour == "never-listens":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    helper = subprocess.Popen(["sleep", "60"])
    write(ready=True, helper=helper.pid)
    time.sleep(60)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

dist.init_process_group("gloo")
total = torch.tensor(float(job.rank + 1))
dist.all_reduce(total)
write(total=total.item(), threads=os.environ["OMP_NUM_THREADS"])

if not chosen and not (behaviour == "dies-once" and (records / "died.json").exists()):
    dist.all_reduce(total)
elif behaviour == "exits":
    with (records / "left.json").open("a") as file:
        file.write(f"{job.rank}\n")
    if len(sys.argv) < 5:
        dist.destroy_process_group()
    sys.exit(int(sys.argv[4]) if len(sys.argv) > 4 else 0)
elif behaviour == "crashes-when-done":
    dist.destroy_process_group()
    atexit.register(os.abort)
elif behaviour in ("raises", "sticks"):
    if behaviour == "sticks":
        threading.Thread(target=time.sleep, args=(120,)).start()
    raise ValueError("the disk is full")
elif behaviour == "dies-once" and (records / "died.json").exists():
    dist.destroy_process_group()
    sys.exit(0)
elif behaviour in ("dies", "dies-once"):
    with (records / "died.json").open("a") as file:
        file.write(f"{job.rank}\n")
    os.kill(os.getpid(), signal.SIGKILL)
