"""Runs of `xtrain run` that take a moment, in this process, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from xtrain.cli import main
from xtrain.records.metrics import StepRecord, read_metrics

SPEC = """\
model: {preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}
data: {source: synthetic, seq_len: 16, tokens: 20_000}
batch: {global: 4, micro: 2}
train: {steps: 12}
optimizer: {name: adamw, lr: 2e-3}
checkpoint: {every_steps: 4}
"""


def run(
    folder: Path, *words: str | Path | int, spec: str = SPEC, backend: str = "null", **sets: Any
) -> Result:
    """`xtrain run` with `--set` from keywords: train__steps=3 sets train.steps to 3."""
    path = folder / "spec.yaml"
    path.write_text(spec)
    overrides = [f"--set={key.replace('__', '.')}={value}" for key, value in sets.items()]
    command = ["run", str(path), "--backend", backend, *overrides, *map(str, words)]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def metrics(out: Path) -> list[StepRecord]:
    return read_metrics(out / "metrics.jsonl")


def steps(out: Path) -> list[int]:
    """The steps that metrics.jsonl has lines for."""
    return [record.step for record in metrics(out)]


def checkpoints(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


def weights(out: Path, step: int) -> bytes:
    """Everything trained, byte for byte."""
    folder = out / "checkpoints" / f"step-{step:08d}"
    return b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))
