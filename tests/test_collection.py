"""Python's garbage collector waits until a run is imported, and not a moment longer."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from xtrain.collection import begin_collecting, collect_later

MODEL = """
import gc
from pathlib import Path
from xtrain.models.gpt2 import GPT2
from xtrain.models.presets import Dimensions

def build(vocab_size):
    with Path("seen").open("a") as seen:
        print(gc.isenabled(), gc.get_freeze_count() > 10_000, file=seen)
    return GPT2(Dimensions(layers=1, hidden=8, heads=1, positions=8, vocab_size=vocab_size))
"""
SPEC = {
    "model": {"factory": "collecting_model:build", "args": {"vocab_size": 257}},
    "data": {"source": "synthetic", "seq_len": 8},
    "batch": {"global": 2},
    "train": {"steps": 2},
    "optimizer": {"lr": 0.001},
}


def test_a_process_that_never_put_it_off_is_left_alone() -> None:
    frozen = gc.get_freeze_count()
    begin_collecting()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_what_was_made_until_it_begins_is_not_looked_at_again() -> None:
    gc.collect()
    frozen = gc.get_freeze_count()
    kept = [[number] for number in range(1000)]
    collect_later()
    assert not gc.isenabled()
    begin_collecting()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= frozen + len(kept)


@pytest.mark.slow
def test_a_run_collects_from_its_engine_on(tmp_path: Path) -> None:
    (tmp_path / "collecting_model.py").write_text(MODEL)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    command = [sys.executable, "-m", "xtrain", "run", "spec.yaml", "--backend", "cpu", "--out", "out"]
    where = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=tmp_path, env=where, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "seen").read_text().splitlines()[-1] == "True True"
