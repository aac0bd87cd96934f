"""Weights that travel to other programs compute there what they compute here."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints.test_commands import as_json, command
from tests.checkpoints.test_format import state
from tests.checkpoints.test_manager import MINIMAL
from tests.checkpoints.test_shares import SHAPES, exported, saves, values
from tests.data.test_tokenizers import word_tokenizer
from tests.small_runs import SPEC, run, weights
from xtrain.checkpoints.export import export
from xtrain.checkpoints.format import MODEL_INDEX, Checkpoint, State
from xtrain.checkpoints.inventory import newest
from xtrain.checkpoints.saving import Save
from xtrain.checkpoints.writer import write
from xtrain.data.tokenizers import load_tokenizer
from xtrain.errors import RequestError, RunFailed
from xtrain.models.library import library_form
from xtrain.models.source import PresetSource, model_source
from xtrain.spec.tree import Spec


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
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_preset_becomes_a_folder_that_hugging_face_loads(out: Path, tmp_path: Path, dtype: str) -> None:
    facts = as_json("export", out, "--to", "hf", "--dtype", dtype, "--out", tmp_path / "hf")
    assert facts["difference"] < 1e-5
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["n_embd"] == 32
    transformers: Any = importlib.import_module("transformers")
    _, loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(loaded[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(tmp_path / "hf" / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    back = model_source(starting_from(tmp_path / "hf", out), 257).build()
    assert torch.equal(back.get_parameter("blocks.0.attention.query_key_value.weight").T, stored.float())


def starting_from(folder: Path, run: Path) -> Spec:
    """The run's spec, beginning with the weights in `folder`."""
    spec: Any = newest(run).state().spec
    return Spec.model_validate({**spec, "model": {**spec["model"], "init_from": str(folder)}})


@pytest.mark.slow
def test_what_is_larger_than_a_file_may_be_is_written_as_several_with_their_index(
    out: Path, tmp_path: Path
) -> None:
    written = export(newest(out), "hf", "bf16", tmp_path / "hf", shard_bytes=40_000)
    index = json.loads((tmp_path / "hf" / MODEL_INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert written.difference is not None
    assert written.difference < 1e-5  # the library has read them all


def test_a_checkpoint_of_several_files_is_merged_into_one(tmp_path: Path) -> None:
    parts = saves(tmp_path / "checkpoints", 3)
    for step in (lambda save: save.write(exported(save.rank, 3)), Save.finish, Save.commit):
        for save in parts if step is not Save.commit else parts[:1]:
            assert step(save) is None
    checkpoint = Checkpoint(tmp_path / "checkpoints" / "step-00000005", 5)
    assert len(list(checkpoint.path.glob("model-*.safetensors"))) == 3
    export(checkpoint, "safetensors", "fp32", tmp_path / "flat")
    assert [path.name for path in (tmp_path / "flat").iterdir()] == ["model.safetensors"]
    found = load_file(tmp_path / "flat" / "model.safetensors")
    assert found.keys() == SHAPES.keys()
    assert all(torch.equal(tensor, values(name, "weight")) for name, tensor in found.items())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config of the library's, a spec of it, and a run."""
    folder = tmp_path_factory.mktemp("llama")
    transformers: Any = importlib.import_module("transformers")
    transformers.LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(folder / "llama")
    transformers.GenerationConfig(temperature=0.7, do_sample=True).save_pretrained(folder / "llama")
    spec = SPEC.replace("{preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}", f"{{hf: {folder}/llama}}")
    words = ("--out", folder / "out", "--stop-after", 3)
    assert run(folder, *words, spec=spec, backend="cpu", train__steps=5).exit_code == 0
    return folder


def loaded(folder: Path, computed_anew: str = "") -> tuple[Any, torch.Tensor]:
    """The library's model of a folder, in fp32, and its logits for some tokens.

    The files must fit it entirely, but for buffers of that name.
    """
    transformers: Any = importlib.import_module("transformers")
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    assert all(computed_anew and computed_anew in name for name in told["unexpected_keys"])
    with torch.no_grad():
        return model, model.eval()(torch.arange(32).reshape(2, 16)).logits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_of_the_library_goes_back_to_it(llama: Path, tmp_path: Path, dtype: str) -> None:
    result = command("export", llama / "out", "--to", "hf", "--dtype", dtype, "--out", tmp_path / "hf")
    assert "loaded by transformers: largest difference of a logit from ours " in result.stdout
    assert "not carried: the tokenizer: the library has none like data.tokenizer bytes" in result.stdout
    assert f"note: generation settings copied from {llama}/llama, which " in result.stderr
    model, _ = loaded(tmp_path / "hf")
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert model.config.use_cache
    assert model.generation_config.temperature == 0.7
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] in ("float32", "bfloat16")


@pytest.mark.slow
def test_a_checkpoint_of_a_library_model_is_a_folder_that_the_library_loads(
    llama: Path, tmp_path: Path
) -> None:
    """And computes there what an export of it does."""
    checkpoint = newest(llama / "out")
    _, found = loaded(checkpoint.path, computed_anew="rotary_emb.original_inv_freq")
    export(checkpoint, "hf", "fp32", tmp_path / "hf")
    assert torch.equal(found, loaded(tmp_path / "hf")[1])
    assert "config.json" in checkpoint.manifest.files
    assert {name.partition(".")[0] for name in checkpoint.reader().keys("weight")} == {"model"}


@pytest.mark.slow
def test_what_was_imported_is_such_a_folder_too(llama: Path, tmp_path: Path) -> None:
    export(newest(llama / "out"), "hf", "fp32", tmp_path / "hf")
    words = ("--from", "hf", "--spec", llama / "spec.yaml", "--out", tmp_path / "new")
    assert command("import", tmp_path / "hf", *words).exit_code == 0
    found = loaded(newest(tmp_path / "new").path, computed_anew="rotary_emb.original_inv_freq")
    assert torch.equal(found[1], loaded(tmp_path / "hf")[1])


@pytest.mark.slow
def test_a_universal_checkpoint_has_the_librarys_names_and_comes_back(llama: Path, tmp_path: Path) -> None:
    before = newest(llama / "out")
    export(before, "ds-universal", "fp32", tmp_path / "universal")
    model, _ = loaded(before.path, computed_anew="rotary_emb.original_inv_freq")
    zero = tmp_path / "universal" / "global_step3" / "zero"
    names = {name for name, _ in model.named_parameters()}
    assert {path.name for path in zero.iterdir() if path.is_dir()} == names
    words = ("--from", "ds-universal", "--spec", llama / "spec.yaml", "--out", tmp_path / "new")
    assert command("import", tmp_path / "universal", *words).exit_code == 0
    after = newest(tmp_path / "new")
    for name in names:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            one, other = (found.reader().read(f"model.{name}", kind) for found in (before, after))
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)


@pytest.mark.slow
def test_an_export_needs_no_folder_but_the_checkpoint(llama: Path, tmp_path: Path) -> None:
    shutil.move(llama / "llama", tmp_path / "away")
    try:
        assert as_json("export", llama / "out", "--to", "hf", "--out", tmp_path / "hf")["difference"] < 1e-5
    finally:
        shutil.move(tmp_path / "away", llama / "llama")


@pytest.mark.slow
def test_a_run_of_a_library_model_goes_on_from_such_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    spec = (llama / "spec.yaml").read_text()
    options: dict[str, Any] = {"spec": spec, "backend": "cpu", "train__steps": 5}
    assert run(tmp_path, "--out", tmp_path / "whole", **options).exit_code == 0
    shutil.copytree(llama / "out", tmp_path / "out")
    assert run(tmp_path, "--resume", tmp_path / "out", **options).exit_code == 0
    assert weights(tmp_path / "out", 5) == weights(tmp_path / "whole", 5)
    started = run(tmp_path, "--out", tmp_path / "next", model__init_from=llama / "out", **options)
    assert started.exit_code == 0


@pytest.mark.slow
def test_the_tokenizer_of_the_data_goes_with_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = word_tokenizer(tmp_path / "words")
    spec = Spec.model_validate({**MINIMAL, "data": {"source": "stdlib", "tokenizer": words}})
    (tmp_path / "hf").mkdir()
    assert list(library_form(spec, 5).write_companions(tmp_path / "hf")) == []
    assert (
        f"note: the tokenizer copied from {words}, which the checkpoint's spec names"
        in capsys.readouterr().err
    )
    assert load_tokenizer(str(tmp_path / "hf")).identity == load_tokenizer(words).identity


@pytest.mark.slow
def test_an_export_that_computes_something_else_is_refused_and_leaves_nothing(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xtrain.models import gpt2_folder

    swapped = {**gpt2_folder.GPT2_NAMES, "attention_norm": "ln_2", "feed_forward_norm": "ln_1"}
    monkeypatch.setattr(gpt2_folder, "GPT2_NAMES", swapped)
    result = command("export", out, "--to", "hf", "--out", tmp_path / "hf")
    assert result.exit_code == 1
    assert "the exported model does not compute what ours does: its logits differ by " in result.stderr
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


def test_a_spec_of_another_size_than_the_weights_is_refused_before_its_model_is_built(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PresetSource) -> torch.nn.Module:
        raise AssertionError("built")

    monkeypatch.setattr(PresetSource, "build", fail)
    real = newest(out)
    spec: dict[str, Any] = json.loads(real.state().model_dump_json())["spec"]
    spec["model"]["hidden"] = 64

    class Forged(Checkpoint):
        def state(self) -> State:
            return super().state().model_copy(update={"spec": spec})

    with pytest.raises(
        RequestError, match=r"another model than its weights: found .* \(257, 32\), expected \(257, 64\)"
    ):
        export(Forged(real.path, real.step), "hf", "fp32", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_into(out: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    result = command("export", out, "--to", "safetensors", "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path} is there already; choose another --out\n"
