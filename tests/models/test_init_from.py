"""A run that starts from stored weights: those of a checkpoint of ours, or of a Hugging Face folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

from xtrain.checkpoints.select import select
from xtrain.cli import main
from xtrain.errors import RequestError
from xtrain.models.gpt2_folder import library_name
from xtrain.models.source import PresetSource, model_source
from xtrain.spec.tree import Spec

VOCABULARY = 257
SPEC: dict[str, Any] = {
    "model": {"preset": "gpt2-nano", "layers": 2, "hidden": 16, "heads": 2, "positions": 32},
    "data": {"source": "synthetic", "seq_len": 32, "tokens": 5000},
    "batch": {"global": 4},
    "train": {"steps": 2},
    "optimizer": {"lr": 0.1},
}


def built(init_from: Path | None = None, **model: Any) -> torch.nn.Module:
    named = {**SPEC["model"], **model, "init_from": init_from and str(init_from)}
    return model_source(Spec.model_validate({**SPEC, "model": named}), VOCABULARY).build()


def other_weights() -> dict[str, torch.Tensor]:
    """Weights that no seed would draw."""
    return {name: weight.detach() + 0.5 for name, weight in built().named_parameters()}


def library_folder(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """In two files, as large models come."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, folder / f"model-{number}.safetensors")
    return folder


def assert_has(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    assert {name for name, _ in model.named_parameters()} == set(weights)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def run(folder: Path, out: str, *options: str) -> str:
    (folder / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    words = ["run", str(folder / "spec.yaml"), "--backend", "cpu", "--out", str(folder / out), *options]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_run_starts_from_the_last_checkpoint_of_another(tmp_path: Path) -> None:
    run(tmp_path, "first")
    last = select(tmp_path / "first", hashes=True).checkpoint
    assert last is not None
    reader = last.reader()
    weights = {name: reader.read(name, "weight") for name in other_weights()}
    for stored in (tmp_path / "first", last.path):
        assert_has(built(stored), weights)  # type: ignore[arg-type]
    assert not torch.equal(built().get_parameter("head.norm.weight"), weights["head.norm.weight"])  # type: ignore[arg-type]
    said = run(tmp_path, "second", "--set", f"model.init_from={tmp_path / 'first'}")
    assert f"vocabulary 257, from {tmp_path / 'first'}: " in said


def test_a_damaged_checkpoint_is_no_start(tmp_path: Path) -> None:
    run(tmp_path, "first")
    last = select(tmp_path / "first", hashes=True).checkpoint
    assert last is not None
    file = next(last.path.glob("model*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(RequestError, match=r"^model.init_from: .*its hash does not fit"):
        built(last.path)


def test_weights_of_a_folder_of_safetensors_replace_the_initial_ones(tmp_path: Path) -> None:
    weights = other_weights()
    assert_has(built(library_folder(tmp_path / "stored", weights)), weights)


def gpt2_folder(folder: Path, wrapper: str = "", **config: Any) -> Path:
    """As save_pretrained writes a GPT-2 with `other_weights`, with the wrapper of a model with a head."""
    weights = {}
    for name, weight in other_weights().items():
        key, transposed = library_name(name)
        weights[f"{wrapper}{key}"] = weight.T.contiguous() if transposed else weight
    library_folder(folder, weights)
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_head": 2, **config}))
    return folder


@pytest.mark.parametrize("wrapper", ["", "transformer."])
def test_a_preset_starts_from_the_librarys_gpt_2_under_its_names(wrapper: str, tmp_path: Path) -> None:
    assert_has(built(gpt2_folder(tmp_path / "gpt2", wrapper)), other_weights())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"n_head": 4}, "n_head: found 4, expected 2 for this preset"),
        ({"activation_function": "relu"}, "activation_function: found 'relu', expected 'gelu_new'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: found 1e-06, expected 1e-05"),
    ],
    ids=str,
)
def test_a_gpt_2_that_computes_something_else_with_the_same_shapes_is_no_start_of_a_preset(
    config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match=re.escape(said)):
        built(gpt2_folder(tmp_path / "gpt2", **config))


def test_a_checkpoint_that_lost_its_manifest_is_not_taken_for_a_folder_of_the_librarys(
    tmp_path: Path,
) -> None:
    folder = library_folder(tmp_path / "step-00000002", other_weights())
    (folder / "state.json").write_text("{}")
    with pytest.raises(RequestError, match=r"^model.init_from: .*manifest.json: No such file"):
        built(folder)


def indexed(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Each tensor in a file of its own, as their index says."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    places = {name: f"model-{number:05d}.safetensors" for number, name in enumerate(sorted(weights))}
    for name, file in places.items():
        save_file({name: weights[name]}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_only_what_an_index_names_is_read(tmp_path: Path) -> None:
    """Not the files of an earlier save, nor tensors that are in a named file but not in the index."""
    weights = other_weights()
    folder = indexed(tmp_path / "stored", weights)
    stale = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    save_file(stale, folder / "model-99999.safetensors")
    first, last = min(weights), max(weights)
    file = folder / f"model-{len(weights) - 1:05d}.safetensors"
    save_file({last: weights[last], first: stale[first]}, file)
    assert_has(built(folder), weights)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (
            '{"weight_map": {"a": "model-00000.safetensors"}}',
            "a is in model-00000.safetensors, which",
        ),
        ('{"weight_map": {"a": "../a"}}', "index.json cannot be read: String should match"),
        ('{"weight_map": {"a": "gone"}}', "gone cannot be read: "),
        ("{", "index.json cannot be read: Invalid JSON"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path, index: str, message: str) -> None:
    folder = indexed(tmp_path / "stored", other_weights())
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(RequestError, match=f"^model.init_from: .*{re.escape(message)}"):
        built(folder)


def test_what_another_library_keeps_without_our_prefix_is_found(tmp_path: Path) -> None:
    (tmp_path / "own_factory.py").write_text("import torch\ndef build(): return torch.nn.Linear(2, 3)\n")
    weights = {"weight": torch.ones(3, 2), "bias": torch.full((3,), 2.0)}
    folder = library_folder(tmp_path / "stored", weights)
    factory = {"preset": None, "layers": None, "hidden": None, "heads": None, "positions": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        model = built(folder, **factory, factory="own_factory:build")
    assert_has(model, {f"model.{name}": weight for name, weight in weights.items()})


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = other_weights()
    del weights["head.norm.bias"]
    weights["head.norm.weight"] = torch.ones(5)
    folder = library_folder(tmp_path / "stored", weights)
    with pytest.raises(RequestError) as refused:
        built(folder)
    assert str(refused.value) == (
        f"model.init_from: found {folder} with head.norm.weight (5,), expected (16,); no head.norm.bias; "
        "expected weights for every parameter: name a checkpoint of this kind and size of model"
    )


def test_what_is_no_weight_is_named(tmp_path: Path) -> None:
    weights = other_weights()
    weights["head.norm.weight"] = torch.ones(16, dtype=torch.int8)
    with pytest.raises(RequestError, match=r"with head.norm.weight of dtype I8, expected float32; expected"):
        built(library_folder(tmp_path / "stored", weights))


def test_misfits_are_told_before_the_model_takes_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PresetSource) -> torch.nn.Module:
        raise AssertionError("built")

    folder = library_folder(tmp_path / "stored", other_weights())
    monkeypatch.setattr(PresetSource, "build", fail)
    with pytest.raises(RequestError, match=r"expected \(257, 24\)"):
        built(folder, hidden=24)


BUFFERED = """\
import torch
class Buffered(torch.nn.Linear):
    def __init__(self):
        super().__init__(2, 3)
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("mask", torch.zeros(2), persistent=False)
build = Buffered
"""


def test_buffers_that_a_state_dict_has_are_taken_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "buffered_factory.py").write_text(BUFFERED)
    monkeypatch.syspath_prepend(tmp_path)
    factory: dict[str, Any] = dict.fromkeys(SPEC["model"]) | {"factory": "buffered_factory:build"}
    stored = {"weight": torch.ones(3, 2), "bias": torch.ones(3), "mask": torch.ones(2)}
    folder = library_folder(tmp_path / "stored", {**stored, "seen": torch.tensor([3, 4])})
    model = built(folder, **factory)
    assert model.get_buffer("model.seen").tolist() == [3, 4]
    assert model.get_buffer("model.mask").tolist() == [0.0, 0.0]
    shutil.rmtree(folder)
    with pytest.raises(RequestError, match=r"with model.seen \(3,\), expected \(2,\)"):
        built(library_folder(folder, {**stored, "seen": torch.tensor([3, 4, 5])}), **factory)
    shutil.rmtree(folder)
    assert built(library_folder(folder, stored), **factory).get_buffer("model.seen").tolist() == [0, 0]


def test_a_damaged_checkpoint_that_was_passed_over_is_said(tmp_path: Path) -> None:
    run(tmp_path, "first", "--set", "checkpoint.every_steps=1")
    (tmp_path / "first" / "checkpoints" / "step-00000002" / "state.json").unlink()
    said = run(tmp_path, "second", "--set", f"model.init_from={tmp_path / 'first'}")
    assert (
        f"note: model.init_from: passed over: {tmp_path}/first/checkpoints/step-00000002/state.json is"
        in said
    )


def test_many_misfits_are_counted(tmp_path: Path) -> None:
    folder = library_folder(tmp_path / "stored", other_weights())
    with pytest.raises(RequestError, match=r"expected \(257, 24\); .* and \d+ more; expected weights"):
        built(folder, hidden=24)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(RequestError, match="expected safetensors in it"):
        built(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(RequestError, match="expected a run directory with a checkpoint in it"):
        built(tmp_path)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = library_folder(tmp_path / "stored", other_weights())
    file = folder / "model-0.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(RequestError, match=r"model-0.safetensors cannot be read"):
        built(folder)


def test_a_pipe_under_the_name_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    folder = library_folder(tmp_path / "stored", other_weights())
    pipe = folder / "model-0.safetensors"
    pipe.unlink()
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR)  # so that a reader would not wait for somebody who writes
    try:
        with pytest.raises(RequestError, match=f"{pipe.name}: found a folder, a pipe or a device"):
            built(folder)
    finally:
        os.close(held)
