"""Recomputing a group of blocks changes nothing but memory and time, whatever the model's loop does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.techniques.kept import kept_bytes
from xtrain.techniques.products import is_dear, keep_products
from xtrain.techniques.recompute import Pass, RecomputeGroup, keep_all

WIDTH, LAYERS = 16, 6
SHAPE = (4, 8, WIDTH)
ACTIVATION_BYTES = 4 * 4 * 8 * WIDTH
GROUPS = {
    "each alone": [[0], [1], [2], [3], [4], [5]],
    "pairs": [[0, 1], [2, 3], [4, 5]],
    "unequal": [[0, 1, 2, 3], [4, 5]],
    "all": [[0, 1, 2, 3, 4, 5]],
    "some": [[0], [1, 2]],
}


class Block(nn.Module):
    """With dropout, and arguments of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide = nn.Linear(WIDTH, 4 * WIDTH)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        inner = self.norm(hidden if shift is None else hidden + shift)
        output: torch.Tensor = hidden + F.dropout(self.narrow(F.gelu(self.wide(inner))), 0.1)
        return output


class TupleBlock(Block):
    def forward(self, hidden: torch.Tensor, shift: torch.Tensor | None = None) -> Any:
        return None, super().forward(hidden, shift)


class InPlaceBlock(Block):
    def forward(self, hidden: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(hidden, shift).mul_(0.9).add_(0.1)


Loop = Callable[[Sequence[nn.Module], torch.Tensor], torch.Tensor]


def chain(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        hidden = block(hidden)
    return hidden


def tuples(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        hidden = block(hidden)[1]
    return hidden


def picks_by_index(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    """As models do that alternate two kinds of attention."""
    shifts = [torch.full((WIDTH,), 0.5), torch.linspace(-1, 1, WIDTH)]
    for place, block in enumerate(blocks):
        hidden = block(hidden, shift=shifts[place % 2])
    return hidden


def changes_in_between(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    for place, block in enumerate(blocks):
        hidden = block(hidden) * (1 + place)
    return hidden


def changes_in_place_in_between(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    for place, block in enumerate(blocks):
        hidden = block(hidden)
        hidden *= 1 + place
    return hidden


def skips(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    """The first half's outputs come back in the second half, as in a U-Net."""
    outputs: list[torch.Tensor] = []
    for place, block in enumerate(blocks):
        hidden = block(hidden, outputs.pop() if place >= LAYERS // 2 else None)
        if place < LAYERS // 2:
            outputs.append(hidden)
    return hidden


def draws_in_between(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        hidden = F.dropout(block(hidden), 0.1)
    return hidden


def drops_blocks(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    return chain([blocks[place] for place in (1, 2, 4)], hidden)


def repeats_blocks(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    return chain([blocks[place] for place in (0, 0, 1, 2, 0, 1, 2, 5)], hidden)


def backwards(blocks: Sequence[nn.Module], hidden: torch.Tensor) -> torch.Tensor:
    return chain(blocks[::-1], hidden)


LOOPS: list[tuple[type[Block], Loop]] = [
    (Block, chain),
    (InPlaceBlock, chain),
    (TupleBlock, tuples),
    (Block, picks_by_index),
    (Block, changes_in_between),
    (Block, changes_in_place_in_between),
    (Block, skips),
    (Block, draws_in_between),
    (Block, drops_blocks),
    (Block, repeats_blocks),
    (Block, backwards),
]


@dataclass
class Trained:
    values: list[torch.Tensor]
    """Outputs, gradients of the input and of all parameters, and a number drawn at the end."""


def make(kind: type[Block] = Block, layers: int = LAYERS) -> list[nn.Module]:
    torch.manual_seed(0)
    return [kind() for _ in range(layers)]


def make_input() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), requires_grad=True)


def train(blocks: list[nn.Module], loop: Loop, dtype: torch.dtype | None = None) -> Trained:
    """Two forward passes, then both backward passes: gradients add up."""
    hidden = make_input()
    outputs = []
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            outputs.append(loop(blocks, hidden * 1.0))
    for output in outputs:
        output.square().sum().backward()
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    gradients = [tensor.grad for tensor in (hidden, *parameters) if tensor.grad is not None]
    return Trained([*outputs, *gradients, torch.rand(1)])


def same(found: Trained, expected: Trained) -> bool:
    pairs = zip(found.values, expected.values, strict=True)
    return all(torch.equal(value, other) for value, other in pairs)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
@pytest.mark.parametrize(("kind", "loop"), LOOPS, ids=[f"{k.__name__}-{f.__name__}" for k, f in LOOPS])
def test_outputs_gradients_and_randomness_are_the_same_to_the_bit(
    kind: type[Block], loop: Loop, groups: list[list[int]]
) -> None:
    expected = train(make(kind), loop)
    blocks = make(kind)
    for group in groups:
        RecomputeGroup([blocks[place] for place in group])
    assert same(train(blocks, loop), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=list(GROUPS))
def test_the_same_under_autocast(groups: list[list[int]], dtype: torch.dtype) -> None:
    expected = train(make(), chain, dtype)
    blocks = make()
    for group in groups:
        RecomputeGroup([blocks[place] for place in group])
    found = train(blocks, chain, dtype)
    assert same(found, expected)
    assert not same(found, train(make(), chain))


@pytest.mark.parametrize(("kind", "loop"), LOOPS, ids=[f"{k.__name__}-{f.__name__}" for k, f in LOOPS])
def test_the_same_where_matrix_products_are_kept(kind: type[Block], loop: Loop) -> None:
    expected = train(make(kind), loop)
    blocks = make(kind)
    for block in blocks:
        RecomputeGroup([block], keep_products)
    assert same(train(blocks, loop), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loop", [chain, picks_by_index])
def test_the_same_where_matrix_products_are_kept_under_autocast(loop: Loop, dtype: torch.dtype) -> None:
    expected = train(make(), loop, dtype)
    blocks = make()
    for block in blocks:
        RecomputeGroup([block], keep_products)
    assert same(train(blocks, loop, dtype), expected)


def test_other_dropout_would_be_seen() -> None:
    expected = train(make(), chain)
    blocks = make()
    torch.rand(1)
    assert not same(train(blocks, chain), expected)


def count_forwards(blocks: list[nn.Module]) -> list[int]:
    """Counts, block by block, every call that reaches it."""
    counts = [0] * len(blocks)
    for place, block in enumerate(blocks):

        def count(module: nn.Module, args: Any, place: int = place) -> None:
            counts[place] += 1

        block.register_forward_pre_hook(count)
    return counts


def test_every_block_of_a_group_is_recomputed_once_and_no_other() -> None:
    blocks = make()
    RecomputeGroup(blocks[:3])
    RecomputeGroup(blocks[4:])
    counts = count_forwards(blocks)
    chain(blocks, make_input()).sum().backward()
    assert counts == [2, 2, 2, 1, 2, 2]


def test_without_gradients_nothing_is_recorded_or_recomputed() -> None:
    blocks = make()
    group = RecomputeGroup(blocks)
    counts = count_forwards(blocks)
    with torch.no_grad():
        chain(blocks, make_input())
    assert counts == [1] * LAYERS
    assert group.open is None


def test_names_and_modules_stay_as_they_are() -> None:
    model = nn.Sequential(*make())
    names, modules = [name for name, _ in model.named_parameters()], list(model)
    RecomputeGroup(modules)
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model) == modules


def kept(groups: list[list[int]], contexts: Any = None, loop: Loop = chain, kind: type[Block] = Block) -> int:
    """Bytes beside the input and the output."""
    blocks = make(kind)
    for group in groups:
        RecomputeGroup([blocks[place] for place in group], *([contexts] if contexts else []))
    hidden = make_input()
    return kept_bytes(lambda: loop(blocks, hidden)) - ACTIVATION_BYTES


def test_a_group_keeps_its_first_input_and_nothing_else() -> None:
    assert kept(GROUPS["each alone"]) == 5 * ACTIVATION_BYTES
    assert kept(GROUPS["pairs"]) == 2 * ACTIVATION_BYTES
    assert kept(GROUPS["unequal"]) == ACTIVATION_BYTES
    assert kept(GROUPS["all"]) == 0


def test_a_block_that_is_not_recomputed_keeps_much_more() -> None:
    assert kept([]) > 10 * kept(GROUPS["each alone"])
    assert kept(GROUPS["each alone"]) < kept(GROUPS["some"]) < kept([])


def test_keeping_matrix_products_lies_in_between() -> None:
    found = kept(GROUPS["each alone"], keep_products)
    assert 2 * kept(GROUPS["each alone"]) < found < 0.7 * kept([])


def test_the_chain_is_recognised_in_tuples_and_beside_other_arguments() -> None:
    assert kept(GROUPS["all"], loop=tuples, kind=TupleBlock) == 0
    assert kept(GROUPS["all"], loop=picks_by_index) <= 2 * 4 * WIDTH


@pytest.mark.parametrize("loop", [changes_in_between, changes_in_place_in_between])
def test_what_the_loop_changed_in_between_is_kept(loop: Loop) -> None:
    assert kept(GROUPS["all"], loop=loop) >= 5 * ACTIVATION_BYTES


def test_nothing_is_left_after_the_backward_pass() -> None:
    blocks = make()
    for pair in GROUPS["pairs"]:
        RecomputeGroup([blocks[place] for place in pair])
    hidden = make_input()

    def step() -> torch.Tensor:
        chain(blocks, hidden).sum().backward()
        for block in blocks:
            block.zero_grad()
        hidden.grad = None
        return hidden

    assert kept_bytes(step) == 0


def test_other_hooks_on_saved_tensors_get_the_input_of_each_group() -> None:
    """Such as one that moves activations off the device."""
    offered: list[torch.Size] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        offered.append(tensor.shape)
        return tensor.clone()

    expected = train(make(), chain)
    blocks = make()
    for pair in GROUPS["pairs"]:
        RecomputeGroup([blocks[place] for place in pair])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        assert same(train(blocks, chain), expected)
    assert offered.count(torch.Size(SHAPE)) == 2 * 3 + 2  # twice three groups; and the squared outputs


def test_a_graph_that_is_retained_can_be_used_again() -> None:
    blocks, plain = make(), make()
    RecomputeGroup(blocks)

    def gradients(used: list[nn.Module]) -> list[torch.Tensor]:
        torch.manual_seed(2)
        hidden = make_input()
        loss = chain(used, hidden).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        assert hidden.grad is not None
        return [hidden.grad]

    assert torch.equal(gradients(blocks)[0], gradients(plain)[0])


def test_frozen_blocks_and_inputs_without_gradient() -> None:
    def gradients(blocks: list[nn.Module]) -> list[torch.Tensor | None]:
        torch.manual_seed(2)
        for parameter in blocks[1].parameters():
            parameter.requires_grad = False
        chain(blocks, make_input().detach()).sum().backward()
        return [parameter.grad for block in blocks for parameter in block.parameters()]

    blocks = make()
    RecomputeGroup(blocks[:4])
    for found, expected in zip(gradients(blocks), gradients(make()), strict=True):
        assert (found is None) == (expected is None)
        assert found is None or expected is None or torch.equal(found, expected)


def test_an_input_that_is_overwritten_later_is_noticed() -> None:
    blocks = make(layers=1)
    RecomputeGroup(blocks)
    hidden = make_input().clone()
    output = blocks[0](hidden)
    with torch.no_grad():
        hidden.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


class Moody(Block):
    """Does more the first time than the second, or less."""

    def __init__(self, more_first: bool) -> None:
        super().__init__()
        self.more = more_first

    def forward(self, hidden: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        hidden = super().forward(hidden.sin().exp() if self.more else hidden)
        self.more = not self.more
        return hidden


@pytest.mark.parametrize("more_first", [True, False])
def test_a_block_that_computes_something_else_the_second_time_is_noticed(more_first: bool) -> None:
    blocks = [Moody(more_first), Moody(more_first)]
    RecomputeGroup(blocks)
    with pytest.raises(RuntimeError, match="a block computed something else in the backward pass"):
        chain(blocks, make_input()).sum().backward()


def test_an_error_in_the_forward_pass_leaves_the_group_usable() -> None:
    blocks = make()
    RecomputeGroup(blocks)
    with pytest.raises(RuntimeError):
        chain(blocks, torch.zeros(2, WIDTH + 1, requires_grad=True))
    torch.manual_seed(3)
    found = train(blocks, chain)
    plain = make()
    torch.manual_seed(3)
    assert same(found, train(plain, chain))


def test_what_only_one_pass_does_does_not_disturb_kept_products() -> None:
    """As where weights lie elsewhere, and are fetched in one pass and still there in the other."""
    expected = train(make(), chain)
    blocks = make()
    fetches: list[int] = []

    def fetch(module: nn.Module, args: Any) -> None:
        fetches.append(1)
        if len(fetches) > len(blocks):
            torch.stack([parameter.detach().sum() for parameter in module.parameters()])

    for block in blocks:
        RecomputeGroup([block], keep_products)
        block.get_submodule("wide").register_forward_pre_hook(fetch)
    assert same(train(blocks, chain), expected)
    assert len(fetches) == 4 * len(blocks)  # two passes, each replayed


class RectifiedInPlace(Block):
    def forward(self, hidden: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
        output: torch.Tensor = self.narrow(self.wide(hidden).relu_())
        return output


def test_a_kept_product_that_is_changed_in_place_is_noticed() -> None:
    blocks = make(RectifiedInPlace)
    for block in blocks:
        RecomputeGroup([block], keep_products)
    with pytest.raises(RuntimeError, match="a matrix product's output was changed in place"):
        chain(blocks, make_input()).sum().backward()


def test_attention_that_draws_its_dropout_is_computed_again() -> None:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    heads = torch.zeros(1, 1, 2, 4)
    assert is_dear(attention, (heads, heads, heads), {})
    assert not is_dear(attention, (heads, heads, heads, 0.1), {})
    assert not is_dear(attention, (heads, heads, heads), {"dropout_p": 0.1})


def test_a_pass_is_freed_with_its_backward_without_waiting_for_the_collector() -> None:
    for contexts in (keep_all, keep_products):
        block = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        RecomputeGroup([block], contexts)
        gc.collect()
        gc.disable()
        try:
            before = sum(isinstance(one, Pass) for one in gc.get_objects())
            for _ in range(3):
                block(torch.randn(2, 4, requires_grad=True)).sum().backward()
            left = sum(isinstance(one, Pass) for one in gc.get_objects()) - before
        finally:
            gc.enable()
        assert left <= 1, contexts  # the last one, until its group is called again
