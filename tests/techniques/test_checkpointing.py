"""From the spec to groups of blocks, on whole models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.techniques.kept import kept_bytes
from xtrain.errors import RequestError
from xtrain.models.adapter import LogitsLoss
from xtrain.models.source import model_source
from xtrain.spec.tree import Checkpointing, Spec
from xtrain.techniques.checkpointing import checkpoint_activations, groups

BATCH, SEQ_LEN, HIDDEN, LAYERS, VOCAB = 4, 64, 32, 8, 50
ACTIVATION_BYTES = 4 * BATCH * SEQ_LEN * HIDDEN


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"every": 1}, [[0], [1], [2], [3], [4], [5], [6], [7], [8], [9]]),
        ({"every": 4}, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        ({"every": 10}, [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]),
        ({"number": 4}, [[0, 1], [2, 3, 4], [5, 6], [7, 8, 9]]),
        ({"number": 1}, [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]),
        ("auto", [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]),
        ({"selective": {"ratio": 0.3}}, [[0], [1], [2]]),
        ({"selective": {"ratio": 0.01}}, [[0]]),
        ({"selective": {"ops": "cheap"}}, [[0], [1], [2], [3], [4], [5], [6], [7], [8], [9]]),
    ],
    ids=str,
)
def test_groups_of_ten_blocks(chosen: Any, expected: list[list[int]]) -> None:
    assert [list(group) for group in groups(Checkpointing.model_validate(chosen), 10)] == expected


@pytest.mark.parametrize("blocks", range(1, 50))
def test_auto_covers_every_block_once_in_about_the_square_root_of_groups(blocks: int) -> None:
    found = groups(Checkpointing.model_validate("auto"), blocks)
    assert [place for group in found for place in group] == list(range(blocks))
    assert abs(len(found) - blocks**0.5) <= 0.5
    assert max(map(len, found)) - min(map(len, found)) <= 1


def make_spec(checkpointing: Any, model: dict[str, Any] | None = None) -> Spec:
    preset = {"preset": "gpt2-nano", "layers": LAYERS, "hidden": HIDDEN, "heads": 2, "dropout": 0.1}
    return Spec.model_validate(
        {
            "model": model or preset,
            "data": {"source": "synthetic", "seq_len": SEQ_LEN},
            "batch": {"global": BATCH},
            "train": {"steps": 1},
            "optimizer": {"lr": 1e-3},
            "memory": {"checkpointing": checkpointing},
        }
    )


def build(checkpointing: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    spec = make_spec(checkpointing)
    model = model_source(spec, VOCAB).build().to(dtype)
    checkpoint_activations(model, spec)
    return model


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN), generator=generator)
    return tokens, tokens.roll(-1, dims=1)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    torch.manual_seed(1)
    loss = model(*make_batch())
    loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return [loss.detach(), *found]


EVERY_WAY = [
    {"every": 1},
    {"every": 3},
    {"number": 2},
    "auto",
    {"selective": {"ratio": 0.5}},
    {"selective": {"ops": "cheap"}},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chosen", EVERY_WAY, ids=str)
def test_a_gpt_with_dropout_has_the_same_loss_and_gradients(chosen: Any, dtype: torch.dtype) -> None:
    for found, expected in zip(gradients(build(chosen, dtype)), gradients(build("none", dtype)), strict=True):
        assert torch.equal(found, expected)


def kept_activations(chosen: Any) -> float:
    """What blocks keep, in activations [batch, seq, width]; what stem and head keep is taken away."""
    fixed = {"preset": "gpt2-nano", "layers": 1, "hidden": HIDDEN, "heads": 2, "dropout": 0.1}
    spec = make_spec({"every": 1}, fixed)
    small = model_source(spec, VOCAB).build()
    checkpoint_activations(small, spec)
    models = build(chosen), small
    of_all, of_one = (kept_bytes(lambda model=model: model(*make_batch())) for model in models)  # type: ignore[misc]
    return (of_all - of_one) / ACTIVATION_BYTES + 1


def test_recomputing_every_block_keeps_one_activation_a_block() -> None:
    assert kept_activations({"every": 1}) == pytest.approx(LAYERS, rel=0.01)


def test_groups_keep_one_activation_a_group() -> None:
    assert kept_activations({"every": 3}) == pytest.approx(3, rel=0.01)
    assert kept_activations({"number": 2}) == pytest.approx(2, rel=0.01)
    assert kept_activations("auto") == pytest.approx(3, rel=0.01)


def test_selective_lies_between_everything_and_nothing() -> None:
    everything, nothing = kept_activations("none"), kept_activations({"every": 1})
    assert everything > 12 * LAYERS
    assert kept_activations({"selective": {"ratio": 0.5}}) == pytest.approx(
        (everything + nothing) / 2, rel=0.01
    )
    assert 2 * nothing < kept_activations({"selective": {"ops": "cheap"}}) < 0.8 * everything


def test_none_leaves_the_model_as_it_is() -> None:
    assert all("forward" not in vars(module) for module in build("none").modules())


@pytest.mark.parametrize("key", ["every", "number"])
def test_more_blocks_in_a_group_than_there_are_is_refused(key: str) -> None:
    with pytest.raises(RequestError) as caught:
        groups(Checkpointing.model_validate({key: 9}), 8)
    assert str(caught.value) == (
        f"memory.checkpointing.{key}: found 9, expected at most the 8 blocks of the model; nearest: 8"
    )


class Own(nn.Module):
    """A model as `factory:` returns it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(HIDDEN, 2, 64) for _ in range(4)))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.layers(self.embedding(tokens)))
        return logits


@pytest.mark.parametrize("path", [None, "layers"])
@pytest.mark.parametrize("chosen", EVERY_WAY[1:], ids=str)
def test_a_model_of_ones_own_has_the_same_loss_and_gradients(chosen: Any, path: str | None) -> None:
    spec = make_spec(chosen, {"factory": "own:build", "blocks": path})
    torch.manual_seed(0)
    plain, model = LogitsLoss(Own(), "here"), LogitsLoss(Own(), "here")
    model.load_state_dict(plain.state_dict())
    checkpoint_activations(model, spec)
    for found, expected in zip(gradients(model), gradients(plain), strict=True):
        assert torch.equal(found, expected)
    assert kept_bytes(lambda: model(*make_batch())) < kept_bytes(lambda: plain(*make_batch()))
