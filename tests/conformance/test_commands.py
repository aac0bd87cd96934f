"""The same, through the commands people type: every way to start a run, and a first comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import yaml

from tests.conformance.plain import train
from tests.jobs import job_environment
from tests.started import running
from xtrain.records.metrics import read_metrics
from xtrain.records.record import load_record
from xtrain.spec.tree import Spec

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
TOLERANCE = 1e-5
SPEC = {
    "model": {"preset": "gpt2-nano", "layers": 2, "hidden": 64, "heads": 2},
    "data": {"source": "synthetic", "seq_len": 32, "tokens": 40_000},
    "batch": {"global": 8, "micro": 2},
    "train": {"steps": 12},
    "optimizer": {"lr": 2e-3},
    "schedule": {"name": "cosine", "warmup": 3},
}
FACTORY = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(257, width)
        self.mix = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 257)

    def forward(self, tokens):
        return self.head(self.mix(self.embedding(tokens))[0])


def build(width=24):
    return Tiny(width)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("commands")
    (made / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    (made / "own_model.py").write_text(FACTORY)
    factory = {**SPEC, "model": {"factory": "own_model:build", "args": {"width": 20}}}
    (made / "factory.yaml").write_text(yaml.safe_dump(factory))
    return made


def started(
    folder: Path, command: Sequence[str | Path], **environ: str
) -> AbstractContextManager[subprocess.Popen[str]]:
    env = {**job_environment(world=2), "TMPDIR": str(folder), **environ}  # torchrun leaves a folder there
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return running([str(word) for word in command], cwd=folder, env=env, **pipes)


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors[-3000:]
    return output


def printed(folder: Path, *command: str | Path, **environ: str) -> str:
    """By the command, to its end."""
    with started(folder, command, **environ) as process:
        return finish(process)


def run(folder: Path, *arguments: str) -> str:
    return printed(folder, BIN / "xtrain", "run", *arguments)


def losses(run_directory: Path) -> list[float]:
    return [
        record.loss for record in read_metrics(run_directory / "metrics.jsonl") if record.loss is not None
    ]


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """Of a plain loop."""
    return train(Spec.model_validate(SPEC)).losses


def agree(found: list[float], expected: list[float]) -> bool:
    return found == pytest.approx(expected, rel=TOLERANCE)


def test_run_starts_its_own_processes(folder: Path, expected: list[float]) -> None:
    run(folder, "spec.yaml", "--backend", "deepspeed", "--nproc", "2", "--out", "own")
    assert agree(losses(folder / "own"), expected)
    record = load_record(folder / "own")
    assert record.world == 2
    assert [memory.rank for memory in record.memory] == [0, 1]
    assert json.loads((folder / "own" / "ds_config.json").read_text())["gradient_accumulation_steps"] == 2


def test_run_joins_a_job_of_torchrun(folder: Path, expected: list[float]) -> None:
    torchrun: list[str | Path] = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    command: list[str | Path] = [
        *torchrun,
        "-m",
        "xtrain",
        "run",
        "spec.yaml",
        "--backend",
        "deepspeed",
        "--out",
        "torchrun",
    ]
    printed(folder, *command)
    assert agree(losses(folder / "torchrun"), expected)
    assert load_record(folder / "torchrun").world == 2


def test_run_joins_a_job_of_the_deepspeed_launcher(folder: Path, expected: list[float]) -> None:
    launcher: list[str | Path] = [BIN / "deepspeed", "--num_gpus", "2", "--no_local_rank", "--module"]
    command = [*launcher, "xtrain", "run", "spec.yaml", "--backend", "deepspeed", "--out", "launcher"]
    printed(folder, *command, PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert agree(losses(folder / "launcher"), expected)
    assert load_record(folder / "launcher").world == 2


def test_run_joins_a_step_of_srun(folder: Path, expected: list[float]) -> None:
    """With the variables that srun sets; there is no SLURM here."""
    command: list[str | Path] = [
        BIN / "xtrain",
        "run",
        "spec.yaml",
        "--backend",
        "deepspeed",
        "--out",
        "slurm",
    ]
    step = {
        "SLURM_JOB_ID": str(10_000 + os.getpid() % 9_000),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NODEID": "0",
    }
    first, second = (started(folder, command, SLURM_PROCID=r, SLURM_LOCALID=r, **step) for r in "01")
    with first as one, second as other:
        finish(one)
        finish(other)
    assert agree(losses(folder / "slurm"), expected)


def test_a_model_from_a_factory_trains_on_both_engines(folder: Path) -> None:
    run(folder, "factory.yaml", "--backend", "cpu", "--out", "factory-cpu")
    zero3 = ["--set", "memory.sharding=parameters"]
    run(folder, "factory.yaml", "--backend", "deepspeed", "--nproc", "2", *zero3, "--out", "factory-zero3")
    found = losses(folder / "factory-cpu")
    assert found[-1] < found[0] - 0.1
    assert agree(losses(folder / "factory-zero3"), found)


@pytest.mark.skipif(sys.platform == "darwin", reason="needs a machine on which mps cannot run")
def test_compare_puts_real_lanes_side_by_side(folder: Path) -> None:
    """A backend that cannot run here is a row with its reason."""
    command: list[str | Path] = [
        BIN / "xtrain",
        "compare",
        "spec.yaml",
        "--backends",
        "cpu,deepspeed,deepspeed:2,mps",
    ]
    output = printed(folder, *command, "--repeats", "1", "--out", "comparison")
    report = json.loads((folder / "comparison" / "report.json").read_text())
    lanes = {lane["name"]: lane for lane in report["lanes"]}
    assert {name: lane["outcome"] for name, lane in lanes.items()} == {
        "cpu": "finished",
        "deepspeed": "finished",
        "deepspeed:2": "finished",
        "mps": "refused",
    }
    for name in ("deepspeed", "deepspeed:2"):
        assert lanes[name]["figures"]["loss_difference"]["relative"] <= TOLERANCE
        assert lanes[name]["figures"]["speed"]["tokens_per_second"] > 0
    assert "mps" in output
    assert "cannot run here" in (folder / "comparison" / "report.md").read_text()
