from __future__ import annotations

import numpy as np
import pytest

from xtrain.data import synthetic
from xtrain.data.cache import hash_tokens


def entropy(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def test_the_language_never_changes() -> None:
    """Byte for byte the same on every machine, Python and numpy version."""
    first = next(synthetic.blocks(12, 257)).tolist()
    assert first == [122, 19, 33, 204, 191, 207, 14, 132, 165, 234, 183, 216]
    digest = "076980a13ee9b7058b217bb21d561f77b783c93699f2274f72098c6fdad9f316"
    assert hash_tokens(synthetic.blocks(1_000_000, 257)) == digest


def test_a_longer_text_begins_with_the_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    short = np.concatenate(list(synthetic.blocks(3000, 50)))
    assert len(short) == 3000
    monkeypatch.setattr(synthetic, "_DOCUMENTS_PER_BLOCK", 2)  # the size of the blocks does not show
    assert (np.concatenate(list(synthetic.blocks(5000, 50)))[:3000] == short).all()


@pytest.mark.parametrize("vocab_size", [3, 10, 257, 50257])
def test_the_separator_is_the_last_id_and_ends_each_document(vocab_size: int) -> None:
    tokens = next(synthetic.blocks(10 * synthetic.DOCUMENT, vocab_size))
    ends = np.arange(1, 11) * synthetic.DOCUMENT - 1
    assert np.flatnonzero(tokens == vocab_size - 1).tolist() == ends.tolist()
    assert tokens.min() >= 0
    assert tokens.max() == vocab_size - 1


def test_two_symbols_tell_more_of_the_next_than_one_and_one_more_than_none() -> None:
    tokens = np.concatenate(list(synthetic.blocks(300_000, 257)))
    before, last, following = tokens[:-2], tokens[1:-1], tokens[2:]
    context = before % 8 * 8 + last % 8
    alone = entropy(following)
    after_one = entropy(last * 257 + following) - entropy(last)
    after_two = entropy(context * 257 + following) - entropy(context)
    assert after_two < 1.4 < 1.6 < after_one < 1.9 < 3.5 < alone < np.log(257)
