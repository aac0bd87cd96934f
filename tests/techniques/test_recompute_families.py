"""Recomputing the blocks of models that are not ours: twelve families, some of which pick masks by index."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.families import FAMILIES, VOCABULARY, write_config
from tests.techniques.kept import kept_bytes
from xtrain.models.blocks import find_blocks
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec
from xtrain.techniques.checkpointing import checkpoint_activations

pytestmark = pytest.mark.slow  # importing transformers takes seconds

SHAPE = (2, 32)
LAYERS = 4
WAYS = [{"every": 1}, {"every": 3}, {"selective": {"ops": "cheap"}}]


def build(folder: Path, checkpointing: Any) -> torch.nn.Module:
    spec = Spec.model_validate(
        {
            "model": {"hf": str(folder)},
            "data": {"source": "synthetic", "seq_len": SHAPE[1]},
            "batch": {"global": SHAPE[0]},
            "train": {"steps": 1},
            "optimizer": {"lr": 0.1},
            "memory": {"checkpointing": checkpointing},
        }
    )
    model = model_source(spec, VOCABULARY).build()
    checkpoint_activations(model, spec)
    return model.train()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, VOCABULARY, SHAPE, generator=torch.Generator().manual_seed(0))
    return tokens, tokens.roll(-1, dims=1)


def loss_and_gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)  # for dropout, which GPT-2 and OPT have
    loss = model(*batch())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_same_to_the_bit_and_less_is_kept(family: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / family, family)
    plain = build(folder, "none")
    assert len(find_blocks(plain, None)) == LAYERS
    expected, kept = loss_and_gradients(plain), kept_bytes(lambda: plain(*batch()))
    for way in WAYS:
        model = build(folder, way)
        for found, value in zip(loss_and_gradients(model), expected, strict=True):
            assert torch.equal(found, value), way
        assert kept_bytes(lambda model=model: model(*batch())) < kept, way  # type: ignore[misc]
