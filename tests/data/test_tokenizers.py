from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from xtrain.data.sources import open_stream
from xtrain.data.tokenizers import ByteTokenizer, load_tokenizer
from xtrain.errors import RequestError
from xtrain.spec.tree import Spec


def test_bytes_are_utf8_and_never_the_separator() -> None:
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert tokenizer.encode("").tolist() == []
    assert (tokenizer.vocab_size, tokenizer.separator) == (257, 256)


def test_missing_transformers_is_named_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # what Python itself does for "not there"
    with pytest.raises(RequestError) as error:
        load_tokenizer("gpt2")
    assert str(error.value) == (
        "data.tokenizer: 'gpt2' is a Hugging Face tokenizer, which needs the transformers library; "
        "`pip install xtrain[hf]`, or use `tokenizer: bytes`"
    )


def word_tokenizer(folder: Path, eos: bool = True, words: str = "the cat sat") -> str:
    """A folder with a tokenizer of whole words, as Hugging Face stores them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<end>", "<unknown>", *words.split()]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unknown>"} | ({"eos_token": "<end>"} if eos else {})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(folder)


class TestHuggingFace:
    @pytest.fixture(autouse=True)
    def transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("transformers", reason="needs transformers: pip install xtrain[hf]")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def test_a_local_folder_encodes_with_its_end_token_between_documents(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(word_tokenizer(tmp_path / "words"))
        assert tokenizer.encode("the cat dog").tolist() == [2, 3, 1]
        assert tokenizer.encode("").dtype == np.int64
        assert (tokenizer.vocab_size, tokenizer.separator) == (5, 0)

    def test_text_is_cached_with_the_tokenizers_end_token_between_documents(self, tmp_path: Path) -> None:
        paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
        for path in paths:
            path.write_text("the cat sat\n")
        spec = Spec.model_validate(
            {
                "model": {"preset": "gpt2-nano"},
                "data": {
                    "source": "text",
                    "path": [str(path) for path in paths],
                    "tokenizer": word_tokenizer(tmp_path / "words"),
                },
                "batch": {"global": 1},
                "train": {"steps": 1},
                "optimizer": {"lr": 0.1},
            }
        )
        stream = open_stream(spec, show_progress=False)
        assert stream.tokens.tolist() == [2, 3, 4, 0, 2, 3, 4]
        assert stream.vocab_size == 5
        assert stream.tokens.dtype == np.uint8

    def test_identity_is_of_the_content_not_of_the_name(self, tmp_path: Path) -> None:
        names = [word_tokenizer(tmp_path / "a"), word_tokenizer(tmp_path / "b")]
        other = word_tokenizer(tmp_path / "c", words="the dog sat")
        first, same, different = (load_tokenizer(name).identity for name in [*names, other])
        assert first == same != different

    def test_a_tokenizer_without_end_token_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match=r"has no end-of-text token \(eos_token\)"):
            load_tokenizer(word_tokenizer(tmp_path / "words", eos=False))

    def test_an_unknown_name_is_a_request_error(self) -> None:
        with pytest.raises(RequestError, match=r"data\.tokenizer: 'no/such-tokenizer' could not be loaded: "):
            load_tokenizer("no/such-tokenizer")
