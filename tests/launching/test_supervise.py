"""What is ended ends with all that it started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.started import running
from xtrain.launching.supervise import AGENT, kill_groups

STARTS_ONE_IN_A_GROUP_OF_ITS_OWN = """\
import subprocess
process = subprocess.Popen(["sleep", "60"], process_group=0)
print(process.pid, flush=True)
process.wait()
"""
WATCHES_ITS_PARENT = f"""\
from xtrain.launching.supervise import watch_parent
watch_parent()
{STARTS_ONE_IN_A_GROUP_OF_ITS_OWN}"""


@pytest.mark.slow
def test_a_compiler_that_ninja_gave_a_group_of_its_own_ends_with_the_worker() -> None:
    command = [sys.executable, "-S", "-c", STARTS_ONE_IN_A_GROUP_OF_ITS_OWN]
    with running(command, stdout=subprocess.PIPE) as worker:
        assert worker.stdout
        compiler = psutil.Process(int(worker.stdout.readline()))
        try:
            kill_groups([worker.pid])
            assert worker.wait() == -signal.SIGKILL
            gone, _ = psutil.wait_procs([compiler], timeout=10)
            assert gone == [compiler]
        finally:
            if compiler.is_running():
                compiler.kill()


@pytest.mark.slow
def test_it_ends_too_with_a_worker_that_somebody_else_started_and_left() -> None:
    """torchrun, say, that was killed: the worker notices, and takes with it what it started."""
    launcher = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {WATCHES_ITS_PARENT!r}])"
    environ = {name: value for name, value in os.environ.items() if name != AGENT}
    with running([sys.executable, "-S", "-c", launcher], stdout=subprocess.PIPE, env=environ) as parent:
        assert parent.stdout
        compiler = psutil.Process(int(parent.stdout.readline()))
        try:
            parent.kill()
            gone, _ = psutil.wait_procs([compiler], timeout=10)
            assert gone == [compiler]
        finally:
            if compiler.is_running():
                compiler.kill()
