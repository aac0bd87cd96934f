"""Runs as real processes that tests send signals to, and what is left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.small_runs import SPEC

MARK = "XTRAIN_TEST_MARK"
PRESET = "{preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}"
ENDLESS = ["--set=train.steps=1000000", "--set=log.every_steps=1"]
STUCK = """\
import time
import torch

class Stuck(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(257, 257)
        self.passes = 0

    def forward(self, tokens):
        self.passes += 1
        while self.passes > 12: STATEMENT
        return self.embedding(tokens)

def build(**ignored):
    return Stuck()
"""
LONGEST_SECONDS = 240
"""On a machine that has other work too."""


@dataclass
class Started:
    """A command in a session of its own, as a terminal would start it."""

    process: subprocess.Popen[str]
    mark: str
    errors: Path
    out: Path

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + LONGEST_SECONDS
        while text not in self.said():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        return self.errors.read_text()

    def send(self, number: signal.Signals) -> None:
        """To the foreground group, as Ctrl-C is; SIGTERM and SIGKILL to the one process that is known."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def ended(self) -> int:
        return self.process.wait(LONGEST_SECONDS)

    def left_behind(self) -> list[psutil.Process]:
        """Processes of this command that live, wherever they moved: by their environment."""
        return [process for process in psutil.process_iter() if _is_marked(process, self.mark)]


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark
    except psutil.Error:
        return False


@pytest.fixture(name="start")
def starting(tmp_path: Path) -> Iterator[Callable[..., Started]]:
    begun: list[Started] = []

    def run_it(command: Sequence[str], out: Path) -> Started:
        mark = uuid.uuid4().hex
        errors = tmp_path / f"errors-{len(begun)}.txt"
        own = {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
        environ = {**os.environ, **own, "TMPDIR": str(tmp_path)}  # who is killed clears nothing away
        with errors.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, text=True, env=environ, start_new_session=True
            )
        begun.append(Started(process, mark, errors, out))
        return begun[-1]

    yield run_it
    for one in begun:
        for process in one.left_behind():
            process.kill()
        one.process.wait()


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Killed with its group however the test ends: Popen's own `with` would wait, perhaps for ever."""
    with subprocess.Popen(command, text=True, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def training(start: Callable[..., Started], folder: Path, words: Sequence[str], spec: str = SPEC) -> Started:
    """`xtrain run`, endless."""
    (folder / "spec.yaml").write_text(spec)
    out = folder / "out"
    command = [sys.executable, "-m", "xtrain", "run", str(folder / "spec.yaml"), *words, "--out", str(out)]
    return start(command, out)


def stuck_model(folder: Path, statement: str) -> str:
    """A spec of which the model, after 12 passes, repeats the statement for ever."""
    (folder / "stuck.py").write_text(STUCK.replace("STATEMENT", statement))
    return SPEC.replace(PRESET, "{factory: stuck:build}")


def nobody_is_left(started: Started) -> bool:
    deadline = time.monotonic() + 10
    while started.left_behind() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not started.left_behind()
