"""Weights that travel to other programs compute there what they compute here."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints.test_commands import as_json, command
from tests.checkpoints.test_format import state
from tests.small_runs import SPEC, run
from xtrain.checkpoints.export import export
from xtrain.checkpoints.format import Checkpoint, State
from xtrain.checkpoints.inventory import newest
from xtrain.checkpoints.writer import write
from xtrain.errors import RequestError, RunFailed


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert run(folder, "--out", folder / "out", backend="cpu", train__steps=3).exit_code == 0
    return folder / "out"


def test_one_merged_file_has_every_weight_under_its_name(out: Path, tmp_path: Path) -> None:
    result = command("export", out, "--to", "safetensors", "--out", tmp_path / "flat")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"wrote step 3 to {tmp_path}/flat: ")
    found, reader = load_file(tmp_path / "flat" / "model.safetensors"), newest(out).reader()
    assert sorted(found) == sorted(reader.keys("weight"))
    for name, tensor in found.items():
        stored = reader.read(name, "weight")
        assert stored is not None
        assert torch.equal(tensor, stored)


def test_sixteen_bits_are_the_rounded_weights(out: Path, tmp_path: Path) -> None:
    command("export", out, "--to", "safetensors", "--dtype", "bf16", "--out", tmp_path / "flat")
    reader = newest(out).reader()
    for name, tensor in load_file(tmp_path / "flat" / "model.safetensors").items():
        stored = reader.read(name, "weight")
        assert stored is not None
        assert torch.equal(tensor, stored.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_preset_becomes_a_folder_that_hugging_face_loads(out: Path, tmp_path: Path, dtype: str) -> None:
    facts = as_json("export", out, "--to", "hf", "--dtype", dtype, "--out", tmp_path / "hf")
    assert facts["difference"] < 1e-5
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["n_embd"] == 32
    transformers: Any = importlib.import_module("transformers")
    _, loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@pytest.mark.slow
def test_a_model_of_the_library_goes_back_to_it(tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(tmp_path / "llama")
    spec = SPEC.replace("{preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}", f"{{hf: {tmp_path}/llama}}")
    assert run(tmp_path, "--out", tmp_path / "out", spec=spec, backend="cpu", train__steps=3).exit_code == 0
    facts = as_json("export", tmp_path / "out", "--to", "hf", "--out", tmp_path / "hf")
    assert facts["difference"] < 1e-5


@pytest.mark.slow
def test_an_export_that_computes_something_else_is_refused_and_leaves_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtrain.models import library

    swapped = {**library.GPT2_NAMES, "attention_norm": "ln_2", "feed_forward_norm": "ln_1"}
    monkeypatch.setattr(library, "GPT2_NAMES", swapped)
    result = command("export", out, "--to", "hf", "--out", tmp_path / "hf")
    assert result.exit_code == 1
    assert "the exported model does not compute what ours does: its outputs differ by " in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_values_that_sixteen_bits_cannot_hold_are_told_and_leave_nothing(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoints", state(3), {("large", "weight"): torch.full((2,), 1e6)})
    with pytest.raises(RunFailed, match="large has values beyond what fp16 holds"):
        export(checkpoint, "safetensors", "fp16", tmp_path / "flat")
    assert not (tmp_path / "flat").exists()
    assert export(checkpoint, "safetensors", "bf16", tmp_path / "flat").bytes


def test_an_export_runs_no_code_that_a_checkpoint_names(out: Path, tmp_path: Path) -> None:
    real = newest(out)
    model = {"hf": str(tmp_path), "trust_remote_code": True}
    forged = real.state().model_copy(update={"spec": {**real.state().spec, "model": model}})

    class Forged(Checkpoint):
        def state(self) -> State:
            return forged

    with pytest.raises(RequestError, match="code of its own"):
        export(Forged(real.path, real.step), "hf", "fp32", tmp_path / "hf")


def test_a_folder_that_is_there_is_not_written_into(out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    result = command("export", out, "--to", "safetensors", "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path} is there already; choose another --out\n"
