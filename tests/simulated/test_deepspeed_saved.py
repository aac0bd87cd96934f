"""What the DeepSpeed engine lets autograd keep: weights by name, the rest on the CPU if that is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from backends.deepspeed.saved import _again, _send, keeping
from tests.simulated.counting import MEMORY
from xtrain.contract import Backend

HERE, SIM = torch.device("cpu"), torch.device("sim", 0)
BATCH, WIDTH = 32, 16
FP32_BYTES = 4


def make_model(device: torch.device) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)).to(
        device
    )


def forward(model: nn.Module, device: torch.device) -> torch.Tensor:
    inputs = torch.linspace(-1, 1, BATCH * WIDTH).reshape(BATCH, WIDTH).to(device)
    loss: torch.Tensor = model(inputs).square().sum()
    return loss


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.to(HERE) for p in model.parameters() if p.grad is not None]


def plain_gradients() -> list[torch.Tensor]:
    model = make_model(HERE)
    forward(model, HERE).backward()
    return gradients(model)


def give_up(model: nn.Module) -> list[torch.Tensor]:
    """As stage 3 does after a forward pass; returns what is to be gathered again."""
    whole = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    return whole


@pytest.mark.parametrize("on_host", [False, True])
def test_weights_that_were_given_up_are_gone_until_the_backward_pass(on_host: bool) -> None:
    model = make_model(HERE)
    for place, parameter in enumerate(model.parameters()):
        parameter.ds_id = place  # type: ignore[attr-defined]
    weights = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    with keeping(3, on_host, keeps_strides=False):
        loss = forward(model, HERE)
    whole = give_up(model)
    assert all(weight.expired() for weight in weights)
    for parameter, value in zip(model.parameters(), whole, strict=True):
        parameter.data = value
    loss.backward()
    torch.testing.assert_close(gradients(model), plain_gradients(), rtol=0, atol=0)


def test_without_it_a_view_of_a_weight_holds_its_memory() -> None:
    model = make_model(HERE)
    weights = [StorageWeakRef(p.untyped_storage()) for p in model.parameters()]
    loss = forward(model, HERE)
    give_up(model)
    assert not all(weight.expired() for weight in weights)
    del loss


def test_what_is_kept_is_on_the_cpu_and_comes_back_for_the_same_gradients(simulated: Backend) -> None:
    model = make_model(SIM)
    before = MEMORY[0].live_bytes
    with keeping(0, on_host=True, keeps_strides=False):
        loss = forward(model, SIM)
    assert MEMORY[0].live_bytes - before < BATCH * WIDTH * FP32_BYTES
    loss.backward()
    torch.testing.assert_close(gradients(model), plain_gradients())


def test_without_it_activations_stay_on_the_device(simulated: Backend) -> None:
    model = make_model(SIM)
    before = MEMORY[0].live_bytes
    with keeping(0, on_host=False, keeps_strides=False):
        loss = forward(model, SIM)
    assert MEMORY[0].live_bytes - before > BATCH * WIDTH * FP32_BYTES
    del loss


def test_what_was_a_part_of_something_wider_comes_back_laid_out_as_it_was(simulated: Backend) -> None:
    part = torch.arange(24.0, device=SIM).view(4, 6)[:, 2:4]
    found = _again(_send(part, keeps_stride=True))
    assert found.device == part.device
    assert found.stride() == part.stride()
    assert torch.equal(found.cpu(), part.cpu())
