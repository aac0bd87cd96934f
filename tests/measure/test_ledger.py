"""Where a step's memory goes, byte by byte, on models small enough to count by hand."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.checkpoint import checkpoint

from xtrain.contract import Holdings
from xtrain.measure.ledger import Ledger, count_bytes

ROWS, WIDTH, VOCABULARY = 10, 8, 32
FLOAT = 4
PARAMETERS = (WIDTH * WIDTH + VOCABULARY * WIDTH) * FLOAT


class Training:
    """A hidden layer and a head under SGD with momentum; step() takes one update under a ledger."""

    def __init__(self, recompute: bool = False) -> None:
        torch.manual_seed(0)
        self.hidden = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.parameters = [self.hidden.weight, self.head.weight]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9, foreach=False)
        self.inputs = torch.randn(ROWS, WIDTH)
        self.targets = torch.arange(ROWS)
        self.recompute = recompute

    def holdings(self) -> Holdings:
        momenta = [kept.get("momentum_buffer") for kept in self.optimizer.state.values()]
        return {
            "parameters": self.parameters,
            "gradients": [p.grad for p in self.parameters if p.grad is not None],
            "optimizer": [momentum for momentum in momenta if momentum is not None],
        }

    def layer(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.hidden(inputs).exp().tanh()  # type: ignore[no-any-return]

    def step(self) -> tuple[float, dict[str, int]]:
        """The loss, and the bytes at the fullest moment."""
        ledger = Ledger(self.holdings)
        with ledger.open():
            with ledger.span("forward"):
                hidden = checkpoint(self.layer, self.inputs, use_reentrant=False) if self.recompute else None
                hidden = self.layer(self.inputs) if hidden is None else hidden
                loss = F.cross_entropy(self.head(hidden), self.targets)
            with ledger.span("backward"):
                loss.backward()
            with ledger.span("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
        (peaks,) = ledger.peaks.values()
        return loss.item(), dict(peaks)


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    training = Training()
    training.step()
    return training.step()[1]


def test_what_the_engine_holds_is_counted_as_it_says(peaks: dict[str, int]) -> None:
    assert peaks["parameters"] == PARAMETERS
    assert peaks["optimizer"] == PARAMETERS


def test_activations_are_what_the_forward_pass_left(peaks: dict[str, int]) -> None:
    """At the peak, in the backward pass of the loss: the results of exp and tanh; and the loss itself."""
    results = 2 * ROWS * WIDTH * FLOAT
    assert results <= peaks["activations"] <= results + 4 * FLOAT


def test_logits_are_known_although_they_were_made_before_the_loss(peaks: dict[str, int]) -> None:
    """log_softmax keeps its result, the gradient of it is made, and then that of the logits themselves."""
    one = ROWS * VOCABULARY * FLOAT
    assert peaks["logits"] in (2 * one, 3 * one)


def test_gradients_are_counted_from_their_birth() -> None:
    """Of the head's weight; the peak comes before the hidden layer's."""
    training = Training()
    training.targets = torch.arange(1)
    training.inputs = torch.randn(1, WIDTH)  # so that gradients outweigh activations
    training.step()
    assert training.step()[1]["gradients"] == PARAMETERS


def test_recomputed_activations_are_activations() -> None:
    training, plain = Training(recompute=True), Training()
    for one in (training, plain):
        one.step()
    (loss, recomputed), (expected, kept) = training.step(), plain.step()
    assert loss == expected
    assert 0 < recomputed["activations"] < kept["activations"]


def test_the_first_step_has_no_optimizer_state_before_its_update() -> None:
    peaks = Training().step()[1]
    assert "optimizer" not in peaks or peaks["optimizer"] == PARAMETERS


def test_a_ledger_changes_neither_losses_nor_random_numbers() -> None:
    def losses(audited: bool) -> list[float]:
        training = Training()
        state = torch.get_rng_state()
        found = [training.step()[0] if audited else bare(training) for _ in range(3)]
        assert torch.equal(torch.get_rng_state(), state)
        return found

    assert losses(True) == losses(False)


def bare(training: Training) -> float:
    loss = F.cross_entropy(training.head(training.layer(training.inputs)), training.targets)
    loss.backward()
    training.optimizer.step()
    training.optimizer.zero_grad()
    return loss.item()


def test_nothing_is_left_hooked() -> None:
    training = Training()
    training.step()
    assert not any(p._backward_hooks for p in training.parameters)
    assert not _global_optimizer_pre_hooks


def test_after_an_error_nothing_is_left_hooked_either() -> None:
    training = Training()
    ledger = Ledger(training.holdings)
    with pytest.raises(ZeroDivisionError), ledger.open(), ledger.span("forward"):
        raise ZeroDivisionError
    assert not any(p._backward_hooks for p in training.parameters)
    assert ledger.peaks == {"cpu": {"parameters": PARAMETERS}}


def test_a_ledger_keeps_nothing_alive() -> None:
    training = Training()
    training.step()
    weight = weakref.ref(training.head.weight.untyped_storage())
    del training
    gc.collect()
    assert weight() is None


def test_bytes_of_shared_storages_are_counted_once() -> None:
    tensor = torch.zeros(10)
    held: dict[str, Any] = {"parameters": [tensor, tensor[2:], tensor.view(2, 5)], "master": []}
    assert count_bytes(held) == {"cpu": {"parameters": 40, "master": 0}}
