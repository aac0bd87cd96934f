"""How many symbols the data has is known before its tokens are."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from tests.data.test_tokenizers import word_tokenizer
from xtrain.data import open_data
from xtrain.data.vocabulary import data_vocabulary
from xtrain.errors import RequestError
from xtrain.spec.tree import Spec

Make = Callable[..., Spec]


def both(spec: Spec) -> tuple[int, int]:
    return data_vocabulary(spec), open_data(spec, show_progress=False).vocab_size


def test_of_the_synthetic_language(make_spec: Make) -> None:
    assert both(make_spec()) == (257, 257)
    assert both(make_spec(model={"preset": "gpt2-nano", "vocab_size": 300})) == (300, 300)


def test_of_bytes(tmp_path: Path, make_spec: Make) -> None:
    (tmp_path / "text.txt").write_text("a line of text\n" * 100)
    assert both(make_spec(source="text", path=str(tmp_path / "text.txt"))) == (257, 257)


@pytest.mark.skipif(find_spec("tokenizers") is None, reason="needs the tokenizers library")
def test_of_a_tokenizer(tmp_path: Path, make_spec: Make) -> None:
    (tmp_path / "text.txt").write_text("the cat sat " * 200)
    spec = make_spec(
        source="text", path=str(tmp_path / "text.txt"), tokenizer=word_tokenizer(tmp_path / "words")
    )
    assert both(spec) == (5, 5)


def test_of_a_file_of_tokens(tmp_path: Path, make_spec: Make) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(1000, dtype=np.int32))
    assert both(make_spec(source="tokens", path=str(tmp_path / "tokens.npy"))) == (1000, 1000)


def test_what_is_not_there_is_named(tmp_path: Path, make_spec: Make) -> None:
    with pytest.raises(RequestError, match="missing"):
        data_vocabulary(make_spec(source="tokens", path=str(tmp_path / "missing.npy")))
