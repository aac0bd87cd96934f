"""Models of the transformers library: what they compute, which weights they start from, what is refused."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.families import FAMILIES, VOCABULARY, write_config
from xtrain.contract import GradualSource
from xtrain.errors import RequestError
from xtrain.models.adapter import HeadLoss, LogitsLoss
from xtrain.models.hf import READ_WHOLE
from xtrain.models.source import NotedSource, model_source
from xtrain.spec.tree import Spec

pytestmark = pytest.mark.slow  # importing transformers takes seconds

SEED = 7
HEADS_OF_THEIR_OWN = ("gpt2", "gemma2", "granite", "phi")
"""Tied, capped, scaled, with a bias."""


def spec_of(folder: Path | str, memory: dict[str, Any] | None = None, **model: Any) -> Spec:
    return Spec.model_validate(
        {
            "model": {"hf": str(folder), **model},
            "data": {"source": "synthetic", "seq_len": 32},
            "batch": {"global": 4},
            "train": {"steps": 2, "seed": SEED},
            "optimizer": {"lr": 0.1},
            "memory": memory or {},
        }
    )


def source_of(folder: Path | str, symbols: int = VOCABULARY, **rest: Any) -> NotedSource:
    return model_source(spec_of(folder, **rest), symbols)


def own_model(folder: Path, **changes: Any) -> Any:
    """As its users build it: the library's own initial weights under the seed."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.AutoConfig.from_pretrained(folder, **changes)
    torch.manual_seed(SEED)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def own_loss(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The library's own loss, as a sum."""
    output = model(input_ids=tokens, labels=targets, shift_labels=targets, num_items_in_batch=1)
    loss: torch.Tensor = output.loss
    return loss


def batch(vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, vocabulary, (2, 3, 32), generator=generator)
    targets[0, :5] = -100
    return tokens, targets


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_the_library(family: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path, family)
    model = source_of(folder, memory={"loss_chunk": 7}).build()
    own = own_model(folder, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, dropout=0.0).train()
    tokens, targets = batch()
    loss, expected = model(tokens, targets), own_loss(own, tokens, targets)
    assert isinstance(model, HeadLoss)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    loss.backward()
    expected.backward()
    found = dict(model.named_parameters())
    assert list(found) == [f"model.{name}" for name, _ in own.named_parameters()]
    largest = max(parameter.grad.abs().max() for parameter in own.parameters())
    for name, parameter in own.named_parameters():
        difference = (found[f"model.{name}"].grad - parameter.grad).abs().max()
        allowed = (
            1e-5 * parameter.grad.abs().max() + 1e-8 * largest
        )  # a bias of keys has nothing but rounding
        assert difference <= allowed, name


@pytest.mark.parametrize("family", HEADS_OF_THEIR_OWN)
@pytest.mark.parametrize("chunk", ["auto", "none", 1000])
def test_the_size_of_a_chunk_does_not_matter(family: str, chunk: Any, tmp_path: Path) -> None:
    folder = write_config(tmp_path, family)
    tokens, targets = batch()
    losses, gradients = [], []
    for size in (chunk, 7):
        model = source_of(folder, memory={"loss_chunk": size}).build()
        loss = model(tokens, targets)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    assert (gradients[0] - gradients[1]).abs().max() <= 1e-5 * gradients[1].abs().max()


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return output


@pytest.mark.parametrize("family", HEADS_OF_THEIR_OWN)
def test_the_full_logits_are_never_held(family: str, tmp_path: Path) -> None:
    """Forward and backward: nothing is as large as tokens x vocabulary."""
    vocabulary, chunk = 3000, 16
    folder = write_config(tmp_path, family, vocab_size=vocabulary)
    model = source_of(folder, memory={"loss_chunk": chunk}).build()
    tokens, targets = batch(vocabulary)
    with Largest() as made:  # type: ignore[no-untyped-call]
        model(tokens, targets).backward()
    weights = max(parameter.numel() for parameter in model.parameters())
    assert made.elements <= max(weights, chunk * vocabulary) < tokens.numel() * vocabulary


def test_the_capped_loss_is_right_where_the_cap_bites(tmp_path: Path) -> None:
    """With logits far beyond the cap; at the start they are small, and a missing cap would not show."""
    folder = write_config(tmp_path, "gemma2", final_logit_softcapping=0.5)
    model, own = source_of(folder).build(), own_model(folder)
    tokens, targets = batch()
    for one in (model, own):
        with torch.no_grad():
            one.get_parameter("model.model.norm.weight" if one is model else "model.norm.weight").add_(20)
    loss, expected = model(tokens, targets), own_loss(own, tokens, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert float(loss.detach()) < 1.1 * (targets >= 0).sum() * 6.1  # ln(257) + 2 x 0.5 at most, per token


# --- which weights --------------------------------------------------------------------------------


def test_tied_embeddings_stay_tied_and_are_counted_once(tmp_path: Path) -> None:
    for tied in (True, False):
        folder = write_config(tmp_path / str(tied), "llama", tie_word_embeddings=tied)
        model: Any = source_of(folder).build()
        own = model.model
        assert (own.lm_head.weight is own.model.embed_tokens.weight) == tied
        assert ("model.lm_head.weight" in dict(model.named_parameters())) != tied


def test_the_vocabulary_of_a_config_can_be_overridden(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "gemma", pad_token_id=200)
    model: Any = source_of(folder, symbols=100, vocab_size=128).build()
    assert model.model.lm_head.weight.shape[0] == 128


def test_initial_weights_depend_on_the_seed(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "llama")
    name = "model.model.layers.0.mlp.up_proj.weight"
    first, again = (source_of(folder).build().get_parameter(name) for _ in range(2))
    spec = spec_of(folder)
    other = spec.model_copy(update={"train": spec.train.model_copy(update={"seed": SEED + 1})})
    assert torch.equal(first, again)
    assert not torch.equal(first, model_source(other, VOCABULARY).build().get_parameter(name))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with config and bf16 weights that no seed would draw."""
    folder = write_config(tmp_path_factory.mktemp("stored"), "llama")
    model = own_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    model.bfloat16().save_pretrained(folder)
    return folder


def test_stored_weights_are_loaded_as_fp32(stored: Path) -> None:
    import transformers

    model = source_of(stored).build()
    expected = transformers.AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    for name, parameter in expected.named_parameters():
        found = model.get_parameter(f"model.{name}")
        assert found.dtype == torch.float32
        assert torch.equal(found, parameter)


def without_one(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def only_the_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        '{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}'
    )


def quantised(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_one, "its files have no weights for model.norm.weight; expected the whole model"),
        (as_pickle, "expected weights as safetensors: reading a pickle runs code"),
        (cut_off, "could not be built: "),
        (quantised, "its weights are quantised"),
        (only_the_index, "could not be built: "),
    ],
)
def test_weights_that_cannot_be_taken_are_refused(
    damage: Callable[[Path], None], message: str, stored: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stored, tmp_path / "copy")
    damage(folder)
    with pytest.raises(RequestError) as refused:
        source_of(folder).build()
    assert message in str(refused.value)
    assert str(folder) in str(refused.value)


# --- what does not fit ----------------------------------------------------------------------------


def test_data_with_more_symbols_than_the_model_has_is_refused(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"the data has 300 symbols; use the model's own tokenizer"):
        source_of(stored, symbols=300)
    with pytest.raises(RequestError, match=r"vocabulary of 257, but .*; set model.vocab_size to 300 or more"):
        source_of(write_config(tmp_path, "llama"), symbols=300)
    with pytest.raises(RequestError, match=r"model.vocab_size: found 300, expected 257"):
        source_of(stored, vocab_size=300)


def test_sequences_longer_than_the_positions_are_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "gpt2", max_position_embeddings=16)
    with pytest.raises(RequestError, match=r"data.seq_len: found 32, expected at most .* nearest: 16"):
        source_of(folder)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    bert = {"model_type": "bert", **FAMILIES["gpt_neox"]}
    (tmp_path / "config.json").write_text(json.dumps(bert))
    with pytest.raises(RequestError, match="expected a causal language model"):
        source_of(tmp_path).build()


def test_a_kind_of_model_that_is_not_known_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(RequestError, match=r"could not be found: .*no-such-model"):
        source_of(tmp_path)


def test_a_config_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(RequestError, match=r"could not be used: .*vocab_size"):
        source_of(tmp_path)


def test_a_name_that_is_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RequestError, match=r"model.hf no-such/model could not be found: .* local cache"):
        source_of("no-such/model")


@pytest.mark.parametrize(
    ("family", "changes"), [("gpt2", {}), ("phi", {}), ("llama", {"hidden_act": "gelu_fast"})]
)
def test_a_gelu_that_the_library_writes_out_is_one_kernel_of_the_same_numbers(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder = write_config(tmp_path, family, **changes)
    source = source_of(folder)
    model: Any = source.build()
    written_out = own_model(folder)
    fused = [name for name, part in model.model.named_modules() if isinstance(part, torch.nn.GELU)]
    assert len(fused) == 4
    assert any("a GELU that" in note for note in source.notes)
    rows = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    for name in fused:
        own = written_out.get_submodule(name)
        torch.testing.assert_close(model.model.get_submodule(name)(rows), own(rows), rtol=1e-6, atol=1e-9)
    assert list(model.model.state_dict()) == list(written_out.state_dict())


# --- dropout --------------------------------------------------------------------------------------


def test_dropouts_of_the_config_are_those_of_the_spec(tmp_path: Path) -> None:
    folder = write_config(tmp_path, "opt", layerdrop=0.3)
    still, dropping = source_of(folder), source_of(folder, dropout=0.25)
    assert not any(module.p for module in still.build().modules() if isinstance(module, torch.nn.Dropout))
    assert "dropout 0 (was 0.1)" in still.notes[0]
    model: Any = dropping.build()
    assert model.model.config.dropout == model.model.config.attention_dropout == 0.25
    assert model.model.config.layerdrop == 0.0
    tokens, targets = batch()
    assert model(tokens, targets) != model(tokens, targets)
    model.eval()
    assert model(tokens, targets) == model(tokens, targets)


def test_dropout_for_a_model_that_has_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mamba", "vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2})
    )
    with pytest.raises(RequestError, match=r"model.dropout: found 0.1, .*\(mamba\) has no dropout"):
        source_of(tmp_path, dropout=0.1)


# --- models that bring their own code -------------------------------------------------------------

OWN_CODE = """
from transformers import LlamaForCausalLM

class Odd(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2 + 0.1
        return output
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with code, whose model does with its logits what no LogitForm says."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "cache")
    auto_map = {"AutoModelForCausalLM": "modeling_odd.Odd"}
    folder = write_config(tmp_path / "odd", "llama", auto_map=auto_map)
    (folder / "modeling_odd.py").write_text(OWN_CODE)
    return folder


def test_a_model_that_is_not_understood_trains_on_its_own_logits_and_says_so(odd: Path) -> None:
    source = source_of(odd, trust_remote_code=True)
    model: Any = source.build()
    assert isinstance(model, LogitsLoss)
    assert source.notes == [
        "model.hf: its logits are made as a whole, not by chunks: "
        "it changes its head's output in a way that is not known here"
    ]
    tokens, targets = batch()
    logits = 2 * own_model(odd)(input_ids=tokens).logits + 0.1
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(tokens, targets), expected, rtol=1e-6, atol=0)


def test_chunks_of_a_size_are_refused_where_they_cannot_be_had(odd: Path) -> None:
    with pytest.raises(RequestError, match=r"memory.loss_chunk: found 7, but .* use auto"):
        source_of(odd, memory={"loss_chunk": 7}, trust_remote_code=True).build()


def test_code_of_a_model_is_not_run_unless_the_spec_trusts_it(odd: Path) -> None:
    model: Any = source_of(odd).build()
    assert type(model.model).__name__ == "LlamaForCausalLM"  # the kind is known without that code
    (odd / "config.json").write_text(
        json.dumps({"model_type": "odd", "auto_map": {"AutoConfig": "modeling_odd.OddConfig"}})
    )
    with pytest.raises(RequestError, match="could not be found"):
        source_of(odd)


# --- weights read one by one -----------------------------------------------------------------------

RENAMED = ("gpt_neox",)
"""Families whose files have other names than the model: the library translates."""


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_read_one_by_one_are_those_that_the_library_loads(family: str, tmp_path: Path) -> None:
    own_model(write_config(tmp_path, family)).bfloat16().save_pretrained(tmp_path)
    source = source_of(tmp_path)
    assert isinstance(source, GradualSource)
    loaded, read = source.build().state_dict(), source.build_gradually().state_dict()
    assert (READ_WHOLE in source.notes) is (family in RENAMED)
    assert list(read) == list(loaded)
    assert all(torch.equal(read[name], loaded[name]) for name in loaded)


def test_files_of_an_earlier_save_beside_the_indexed_ones_are_not_read(tmp_path: Path) -> None:
    own_model(write_config(tmp_path, "llama")).save_pretrained(tmp_path, max_shard_size="20kB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 1
    stale = {name: torch.zeros_like(weight) for name, weight in load_file(files[0]).items()}
    save_file(stale, tmp_path / "model-99999-of-99999.safetensors", {"format": "pt"})
    source = source_of(tmp_path)
    assert isinstance(source, GradualSource)
    loaded, read = source.build().state_dict(), source.build_gradually().state_dict()
    assert READ_WHOLE not in source.notes
    assert all(torch.equal(read[name], loaded[name]) for name in loaded)


def test_two_tensors_for_tied_weights_are_left_to_the_library(tmp_path: Path) -> None:
    own = own_model(write_config(tmp_path, "gemma"))
    own.save_pretrained(tmp_path)
    name = tmp_path / "model.safetensors"
    weights = load_file(name)
    head = {"lm_head.weight": weights["model.embed_tokens.weight"] + 1}
    save_file({**weights, **head}, name, {"format": "pt"})
    source = source_of(tmp_path)
    assert isinstance(source, GradualSource)
    loaded, read = source.build().state_dict(), source.build_gradually().state_dict()
    assert READ_WHOLE in source.notes
    assert all(torch.equal(read[name], loaded[name]) for name in loaded)
