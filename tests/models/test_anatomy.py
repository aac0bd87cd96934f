"""The head of a model, and what becomes of its output, are found by experiment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from xtrain.models.anatomy import Head, UnknownHead, find_head, is_causal
from xtrain.models.loss import PLAIN, LogitForm

VOCABULARY, WIDTH = 29, 8


class Body(nn.Module):
    """A causal model without attention: the mean of the tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.embedding(input_ids).cumsum(dim=1)
        return SimpleNamespace(last_hidden_state=self.dropout(hidden))


class Model(nn.Module):
    """As the transformers library builds one."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = Body()
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embedding

    def get_output_embeddings(self) -> nn.Module | None:
        return self.out

    def after(self, output: torch.Tensor) -> torch.Tensor:
        return output

    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.after(self.out(self.base_model(input_ids).last_hidden_state)))


class Scaled(Model):
    def after(self, output: torch.Tensor) -> torch.Tensor:
        return output / 3


class Capped(Model):
    def after(self, output: torch.Tensor) -> torch.Tensor:
        return torch.tanh(output / 15) * 15


class ScaledAndCapped(Model):
    def after(self, output: torch.Tensor) -> torch.Tensor:
        return torch.tanh(output * 0.25 / 15) * 15


class Shifted(Model):
    def after(self, output: torch.Tensor) -> torch.Tensor:
        return output + 0.01


class ShiftedAtOneSymbol(Model):
    def after(self, output: torch.Tensor) -> torch.Tensor:
        return output.index_fill(-1, torch.tensor([3]), -1e4)


class Clipped(Model):
    def after(self, output: torch.Tensor) -> torch.Tensor:
        return output.clamp(-15, 15)


class ScaledBefore(Model):
    def forward(self, input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.out(self.base_model(input_ids).last_hidden_state / 2))


class HeadTwice(Model):
    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.base_model(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.out(hidden) + self.out(hidden))


class OwnLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


class OwnHead(Model):
    def __init__(self) -> None:
        super().__init__()
        self.out = OwnLinear(WIDTH, VOCABULARY)


class NoHead(Model):
    def get_output_embeddings(self) -> None:
        return None


class Bidirectional(Model):
    def forward(self, input_ids: torch.Tensor) -> Any:
        hidden = self.base_model(input_ids).last_hidden_state
        return SimpleNamespace(logits=self.out(hidden.flip(1)))


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (Model, PLAIN),
        (Scaled, LogitForm(1 / 3)),
        (Capped, LogitForm(1.0, 15.0)),
        (ScaledAndCapped, LogitForm(0.25, 15.0)),
    ],
)
def test_a_scale_and_a_cap_are_measured(kind: type[Model], form: LogitForm) -> None:
    found = find_head(kind())
    assert found.path == "out"
    assert found.form.scale == pytest.approx(form.scale, rel=1e-6)
    assert found.form.cap == form.cap


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Shifted, "in a way that is not known"),
        (ShiftedAtOneSymbol, "in a way that is not known"),
        (Clipped, "in a way that is not known"),
        (ScaledBefore, "something else than the last hidden state"),
        (HeadTwice, "calls its head 2 times"),
        (OwnHead, "is a OwnLinear; expected an nn.Linear"),
        (NoHead, "is not named; expected an nn.Linear"),
    ],
)
def test_what_is_not_understood_is_left_alone(kind: type[Model], why: str) -> None:
    with pytest.raises(UnknownHead, match=why):
        find_head(kind())


def test_a_model_that_looks_ahead_is_told_from_one_that_does_not() -> None:
    assert is_causal(Model())
    assert not is_causal(Bidirectional())


@pytest.mark.parametrize("training", [True, False])
def test_a_model_is_left_as_it_was(training: bool) -> None:
    model = Model().train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert find_head(model) == Head("out")
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.out._forward_hooks
