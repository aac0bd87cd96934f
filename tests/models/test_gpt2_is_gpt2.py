"""The built-in GPT-2 is GPT-2: with its weights, the transformers library's model gives the same logits."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from xtrain.models.gpt2 import GPT2
from xtrain.models.init import initialise
from xtrain.models.presets import Dimensions

SIZE = Dimensions(layers=3, hidden=48, heads=4, positions=64, vocab_size=101)

STEM_AND_HEAD = {
    "stem.token_embedding.weight": "transformer.wte.weight",
    "stem.position_embedding.weight": "transformer.wpe.weight",
    "head.norm": "transformer.ln_f",
}
IN_A_BLOCK = {
    "attention_norm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.expansion": "mlp.c_fc",
    "feed_forward.projection": "mlp.c_proj",
}
"""Our names and the library's."""


def library_name(name: str) -> str:
    if name in STEM_AND_HEAD:
        return STEM_AND_HEAD[name]
    module, _, kind = name.rpartition(".")
    if module in STEM_AND_HEAD:
        return f"{STEM_AND_HEAD[module]}.{kind}"
    _, layer, inner = module.split(".", 2)
    return f"transformer.h.{layer}.{IN_A_BLOCK[inner]}.{kind}"


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
            linear = name.endswith(("query_key_value.weight", "projection.weight", "expansion.weight"))
            model.get_parameter(library_name(name)).copy_(weight.t() if linear else weight)
            missing.remove(library_name(name))
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
