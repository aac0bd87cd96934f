"""The built-in GPT-2 is GPT-2: with its weights, the transformers library's model gives the same logits."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from xtrain.models.gpt2 import GPT2
from xtrain.models.gpt2_folder import WRAPPER, library_name
from xtrain.models.init import initialise
from xtrain.models.presets import Dimensions

SIZE = Dimensions(layers=3, hidden=48, heads=4, positions=64, vocab_size=101)


def library_model(ours: GPT2) -> Any:
    """The library's model of that size with our weights; its linear layers keep theirs transposed."""
    transformers: Any = importlib.import_module("transformers")
    config = transformers.GPT2Config(
        vocab_size=SIZE.vocab_size,
        n_positions=SIZE.positions,
        n_embd=SIZE.hidden,
        n_layer=SIZE.layers,
        n_head=SIZE.heads,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    missing = {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        for name, weight in ours.named_parameters():
            key, transposed = library_name(name)
            model.get_parameter(f"{WRAPPER}{key}").copy_(weight.t() if transposed else weight)
            missing.remove(f"{WRAPPER}{key}")
    assert not missing
    return model


@pytest.fixture
def ours() -> GPT2:
    """With biases and norms that are not what they start as, so that each one counts."""
    model = GPT2(SIZE)
    initialise(model, 1, SIZE.layers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.mark.slow  # importing transformers takes seconds
def test_logits_are_those_of_the_library_s_gpt2_with_the_same_weights(ours: GPT2) -> None:
    tokens = torch.randint(0, SIZE.vocab_size, (2, 40), generator=torch.Generator().manual_seed(1))
    library = library_model(ours)
    with torch.no_grad():
        found, expected = ours(tokens), library(input_ids=tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
