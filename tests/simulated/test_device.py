"""The simulated device itself: strict, counted, and the same arithmetic as the CPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.simulated.backend import usual_torch
from tests.simulated.counting import MEMORY, TRAFFIC

SIM = torch.device("sim", 0)
OTHER = torch.device("sim", 1)


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    gc.collect()
    TRAFFIC.clear()
    for memory in MEMORY:
        memory.limit_bytes = None
        memory.reset_peak()
    with usual_torch():
        yield
    for memory in MEMORY:
        memory.limit_bytes = None


class Tiny(nn.Module):
    """Embedding, attention, norm, GELU, a tied head: a transformer's operations in a few lines."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def block(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, seq, width = hidden.shape
        query, key, value = self.mix(self.norm(hidden)).view(batch, seq, 3, 2, 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: torch.Tensor = hidden + F.gelu(self.out(mixed.transpose(1, 2).reshape(batch, seq, width)))
        return output

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.block(self.embedding(tokens))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), tokens.flatten())


TOKENS = torch.arange(2 * 6).view(2, 6) % 11


def train(device: torch.device, make: Any, wrap: Any = None) -> list[float]:
    """Losses of a few updates."""
    model = Tiny().to(device)
    if wrap:
        plain = model.block
        model.block = lambda hidden: wrap(plain, hidden)  # type: ignore[method-assign]
    optimizer = make(model.parameters())
    tokens = TOKENS.to(device)
    losses = []
    for _ in range(4):
        loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


OPTIMIZERS = {
    "adamw-single": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_as_the_cpu_does(name: str) -> None:
    found = train(SIM, OPTIMIZERS[name])
    assert found == pytest.approx(train(torch.device("cpu"), OPTIMIZERS[name]), rel=1e-6)
    assert found[-1] < found[0]


def recomputed(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def selected(function: Any, *args: Any) -> Any:
    def policy(context: Any, op: Any, *rest: Any, **more: Any) -> CheckpointPolicy:
        kept = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    context_fn = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, context_fn=context_fn)


def kept_on_the_cpu(function: Any, *args: Any) -> Any:
    with torch.autograd.graph.save_on_cpu():
        return function(*args)


@pytest.mark.parametrize("wrap", [recomputed, selected, kept_on_the_cpu])
def test_checkpointing_and_saved_tensor_hooks_work_on_it(wrap: Any) -> None:
    make = OPTIMIZERS["adamw-foreach"]
    assert train(SIM, make, wrap) == pytest.approx(train(SIM, make), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_follows_the_rules_of_the_cpu(dtype: torch.dtype) -> None:
    losses = []
    for place in ("cpu", "sim"):
        model, tokens = Tiny().to(place), TOKENS.to(place)
        with torch.autocast(place, dtype):
            assert model.mix(model.embedding(tokens)).dtype == dtype
            loss = model(tokens)
        loss.backward()
        assert model.mix.weight.grad is not None
        assert model.mix.weight.grad.dtype == torch.float32
        losses += [loss.item(), float(model.mix.weight.grad.norm())]
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-6)


def test_a_cpu_tensor_cannot_meet_it() -> None:
    with pytest.raises(RuntimeError, match="sim:0 and cpu"):
        torch.ones(3, device=SIM) + torch.ones(3)


def test_two_simulated_devices_cannot_meet_either() -> None:
    with pytest.raises(RuntimeError, match="found sim:0 and sim:1"):
        torch.ones(3, device=SIM) @ torch.ones(3, device=OTHER)


def test_numpy_cannot_see_it() -> None:
    with pytest.raises(TypeError, match="sim:0"):
        torch.ones(3, device=SIM).numpy()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, dtype=torch.float64).to(SIM),
        lambda: torch.zeros(3, dtype=torch.float64, device=SIM),
        lambda: torch.ones(3, device=SIM).double(),
    ],
)
def test_float64_is_refused(make: Any) -> None:
    with pytest.raises(TypeError, match=r"the simulated device has no torch\.float64"):
        make()


def test_bytes_are_counted_by_storage_until_they_are_freed() -> None:
    before = MEMORY[0].live_bytes
    tensor = torch.zeros(1000, device=SIM)
    views = [tensor[10:], tensor.view(10, 100), tensor.t(), tensor.detach()]
    assert MEMORY[0].live_bytes == before + 4000
    other = tensor + 1
    assert MEMORY[0].live_bytes == before + 8000
    del tensor, other
    assert MEMORY[0].live_bytes == before + 4000
    views.clear()
    assert MEMORY[0].live_bytes == before
    assert MEMORY[0].peak_bytes == before + 8000


def test_what_only_autograd_holds_is_counted() -> None:
    before = MEMORY[0].live_bytes
    leaf = torch.ones(1000, device=SIM, requires_grad=True)
    result = leaf.exp().sum()  # exp keeps its result, which nothing in Python refers to
    assert MEMORY[0].live_bytes == before + 8000 + 4
    result.backward()
    del result
    assert leaf.grad is not None
    assert MEMORY[0].live_bytes == before + 8000


def test_a_training_leaves_nothing_behind() -> None:
    before = MEMORY[0].live_bytes
    train(SIM, OPTIMIZERS["adamw-foreach"])
    gc.collect()
    assert MEMORY[0].live_bytes == before


def test_every_copy_is_counted_each_way() -> None:
    there = torch.ones(10).to(SIM)
    across = there.to(OTHER)
    across.to("cpu")
    there.to("cpu", torch.bfloat16)
    counted = {way: (copies.count, copies.bytes) for way, copies in TRAFFIC.copies.items()}
    assert counted == {
        ("cpu", "sim:0"): (1, 40),
        ("sim:0", "sim:1"): (1, 40),
        ("sim:1", "cpu"): (1, 40),
        ("sim:0", "cpu"): (1, 20),
    }
    assert TRAFFIC.numbers_read == 0
    assert float(there.sum()) == 10.0
    assert TRAFFIC.numbers_read == 1


def test_it_can_run_out_of_memory() -> None:
    MEMORY[0].limit_bytes = MEMORY[0].live_bytes + 4000
    kept = torch.zeros(900, device=SIM)
    with pytest.raises(torch.OutOfMemoryError, match=r"sim:0 is out of memory: 800 bytes wanted"):
        torch.zeros(200, device=SIM)
    assert kept.sum() == 0
    assert MEMORY[0].live_bytes <= MEMORY[0].limit_bytes


def test_random_numbers_are_its_own_and_can_be_put_back() -> None:
    torch.manual_seed(3)
    host = torch.get_rng_state()
    state = torch.sim.get_rng_state()  # type: ignore[attr-defined]
    first = torch.rand(5, device=SIM).cpu()
    assert torch.equal(torch.get_rng_state(), host)
    assert torch.equal(first, torch.rand(5))  # both were seeded alike
    torch.sim.set_rng_state(state)  # type: ignore[attr-defined]
    assert torch.equal(torch.rand(5, device=SIM).cpu(), first)


def test_dropout_is_recomputed_alike() -> None:
    make = OPTIMIZERS["sgd"]

    def dropped(function: Any, hidden: torch.Tensor) -> Any:
        return F.dropout(function(hidden), 0.5)

    def both(function: Any, hidden: torch.Tensor) -> Any:
        return recomputed(lambda inner: dropped(function, inner), hidden)

    assert train(SIM, make, both) == pytest.approx(train(SIM, make, dropped), rel=1e-6)


def test_an_index_is_kept() -> None:
    model = Tiny().to(OTHER)
    assert {p.device for p in model.parameters()} == {OTHER}
    model(TOKENS.to(OTHER)).backward()
    assert {p.grad.device for p in model.parameters() if p.grad is not None} == {OTHER}
