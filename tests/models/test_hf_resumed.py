"""A run of a stored model goes on where that model lies elsewhere, or lies no more: its config is enough."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.models.families import write_config
from tests.models.test_hf import own_model
from tests.small_runs import SPEC, run, weights

pytestmark = pytest.mark.slow  # importing transformers takes seconds

HF = SPEC.replace("model: {preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}\n", "")


def begun(folder: Path) -> dict[str, Any]:
    """What a run of the model in `folder` is called with."""
    return {"spec": HF, "backend": "cpu", "model__hf": folder}


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    folder = write_config(tmp_path / "stored", "llama")
    own_model(folder).save_pretrained(folder)
    return folder


def test_a_run_of_stored_weights_goes_on_without_them(stored: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(tmp_path, "--out", whole, **begun(stored)).exit_code == 0
    assert run(tmp_path, "--out", out, "--stop-after", 5, **begun(stored)).exit_code == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(stored / "config.json", moved)
    shutil.rmtree(stored)
    done = run(tmp_path, "--resume", out, **begun(moved))
    assert done.exit_code == 0, done.stderr
    assert "a checkpoint's weights" in done.stderr
    assert weights(out, 12) == weights(whole, 12)


def test_another_config_of_the_same_shapes_is_another_training(stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(tmp_path, "--out", out, "--stop-after", 5, **begun(stored)).exit_code == 0
    other = write_config(tmp_path / "other", "llama", rms_norm_eps=1e-3)
    refused = run(tmp_path, "--resume", out, **begun(other))
    assert refused.exit_code == 2
    assert f"  model.hf: {stored} there, {other} here\n" in refused.stderr
