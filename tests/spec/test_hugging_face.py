"""What `xtrain check` says of `model.hf`, without torch and without the transformers library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from xtrain.models.hf_folder import CONFIG_BYTES, local_folder
from xtrain.spec.check import check_spec
from xtrain.spec.tree import Spec

CONFIG = {"model_type": "llama", "hidden_size": 32}


def problems(name: str, **model: Any) -> list[str]:
    tree = {
        "model": {"hf": name, **model},
        "data": {"source": "stdlib"},
        "batch": {"global": 16},
        "train": {"steps": 200},
        "optimizer": {"lr": 1e-3},
    }
    return [str(problem) for problem in check_spec(Spec.model_validate(tree))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`models/llama` from here, with a config."""
    made = tmp_path / "models" / "llama"
    made.mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return made


def test_a_folder_with_a_config_is_fine_with_and_without_weights(folder: Path) -> None:
    assert problems("models/llama") == []
    (folder / "pytorch_model.bin").touch()
    (folder / "model-00001-of-00002.safetensors").touch()
    assert problems(str(folder), trust_remote_code=True) == []


@pytest.mark.parametrize("name", ["gpt2", "EleutherAI/pythia-14m", "org/model.v1_2"])
def test_a_name_is_not_looked_up(name: str, folder: Path) -> None:
    assert local_folder(name) is None
    assert problems(name) == []


@pytest.mark.parametrize(
    ("hf", "nearest"),
    [
        ("models/lama", "did you mean models/llama?"),
        ("./lama", "looked from "),
        ("~/no/such", "looked from "),
        ("/no/such", "looked from "),
        ("a/b/c", "looked from "),
        ("./" + "a" * 5000, "looked from "),
        ("~nobody/at/all", "looked from "),
    ],
)
def test_a_folder_that_is_not_there_is_refused_with_its_path(hf: str, nearest: str, folder: Path) -> None:
    (found,) = problems(hf)
    expanded = Path(os.path.expanduser(hf))  # noqa: PTH111
    assert found.startswith(f"model.hf: found {expanded}, expected a folder that exists; {nearest}")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "names no model_type"),
        (b'{"hidden_size": 3}', "names no model_type"),
        (b" " * (CONFIG_BYTES + 1), "is larger than 1,048,576 bytes"),
    ],
)
def test_a_config_that_is_none_is_refused(content: bytes, fault: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    assert problems("models/llama") == [
        f"model.hf: found models/llama/config.json, which {fault}, expected the config of a model, "
        "as save_pretrained writes it; write it again"
    ]


def test_a_folder_without_a_config_is_refused(folder: Path) -> None:
    assert problems("models") == [
        "model.hf: found models, expected a folder with config.json in it; "
        "name the folder that save_pretrained wrote"
    ]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "weights.pt"])
def test_weights_in_a_pickle_are_refused_and_not_taken_for_no_weights(name: str, folder: Path) -> None:
    (folder / name).touch()
    assert problems("models/llama") == [
        f"model.hf: found models/llama/{name}, expected weights as safetensors: reading a pickle runs code "
        "that is in it; save the model again, with a current transformers"
    ]


def test_safetensors_that_would_not_be_read_are_refused_and_not_taken_for_no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").touch()
    (found,) = problems("models/llama")
    assert found.startswith(
        "model.hf: found models/llama/adapter_model.safetensors, expected weights in model.safetensors"
    )
    (folder / "model.safetensors.index.json").touch()
    assert problems("models/llama") == []


def test_trust_without_a_model_to_trust_is_refused() -> None:
    assert problems("gpt2", trust_remote_code=True) == []
    assert problems("", hf=None, preset="gpt2", trust_remote_code=True) == [
        "model.trust_remote_code: found true, expected only with model.hf; leave it out"
    ]
