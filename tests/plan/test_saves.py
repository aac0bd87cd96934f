"""The copy that a save in the background keeps is as large as it was predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.test_manager import MINIMAL
from tests.small_runs import run
from xtrain import registry
from xtrain.checkpoints.manager import Checkpointer
from xtrain.contract import Job, StepInput
from xtrain.data import open_data
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.plan.command import answer_spec
from xtrain.plan.saves import background_copy_bytes
from xtrain.records.record import load_record, prediction
from xtrain.records.summary import format_bytes
from xtrain.spec.tree import Spec

OPTIMIZERS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 1e-3},
    {"name": "sgd", "lr": 1e-3, "momentum": 0.9},
    {"name": "sgd", "lr": 1e-3},
]
SMALL = {"preset": "gpt2-nano", "layers": 1, "hidden": 32, "heads": 2}


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["adamw", "momentum", "sgd"])
@pytest.mark.parametrize("precision", ["fp32", {"dtype": "bf16", "weights": "bf16"}], ids=["fp32", "bf16"])
def test_the_copy_of_a_background_save_is_what_was_predicted(
    tmp_path: Path, optimizer: dict[str, Any], precision: Any
) -> None:
    spec = Spec.model_validate(
        {
            **MINIMAL,
            "model": SMALL,
            "data": {"source": "synthetic", "seq_len": 16, "tokens": 20_000},
            "optimizer": optimizer,
            "precision": precision,
            "checkpoint": {"background": True},
        }
    )
    backend, data = registry.load("cpu"), open_data(spec, show_progress=False)
    resolved = backend.resolve(spec, 1)
    engine = backend.start(resolved, model_source(spec, data.vocab_size), Job())
    engine.train_step(
        StepInput(0, data.micro_batches(0, 0, 1), 1e-3, data.target_tokens(0)), None, NullTrace()
    )
    checkpointer = Checkpointer(
        spec.checkpoint, resolved, data.content_hash, None, tmp_path, print, lambda: None
    )
    checkpointer.save(engine, 1, last=True)
    assert checkpointer.buffers.bytes == background_copy_bytes(spec, engine.parameter_count, 1)


def test_a_run_holds_its_copy_against_what_was_predicted(tmp_path: Path) -> None:
    result = run(tmp_path, "--out", tmp_path / "out", backend="cpu", checkpoint__background="true")
    record = load_record(tmp_path / "out")
    (memory,), predicted = record.memory, prediction(record)
    assert predicted is not None
    assert memory.save_copy_bytes == predicted.save_copy_bytes > 0
    said = format_bytes(memory.save_copy_bytes)
    told = f"memory, a copy for saves {said} on the host, predicted {said} (+0.0%)"
    assert told in " ".join(result.stdout.split())
    result = run(tmp_path, "--out", tmp_path / "at-once", backend="cpu")
    assert load_record(tmp_path / "at-once").memory[0].save_copy_bytes is None
    assert "a copy for saves" not in result.stdout


def test_without_saves_in_the_background_nothing_is_kept() -> None:
    assert background_copy_bytes(Spec.model_validate(MINIMAL), 1000, 1) == 0


def test_the_plan_says_it(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(json.dumps({**MINIMAL, "checkpoint": {"background": True}}))
    said = answer_spec(tmp_path / "spec.yaml", (), 1, "cpu", None, False)
    assert "A save in the background keeps a copy of " in said
    assert "background" not in answer_spec(
        tmp_path / "spec.yaml", ("checkpoint.background=false",), 1, "cpu", None, False
    )
