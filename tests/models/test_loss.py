"""The chunked cross-entropy is the plain one, with less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from xtrain.contract import IGNORED_TARGET
from xtrain.models.loss import PLAIN, adds_unrounded, loss_and_gradient, projected_cross_entropy_sum
from xtrain.models.loss_chunk import LossChunk

TOKENS, WIDTH, VOCABULARY = (4, 32), 16, 50


def loss_and_gradients(
    chunk: LossChunk, upstream: float = 1 / 123, autocast: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, TOKENS, generator=generator)
    targets[0, :5] = IGNORED_TARGET
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = projected_cross_entropy_sum(hidden, weight, targets, chunk)
    (loss * upstream).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("chunk", ["auto", 1, 7, 128, 1000])
def test_chunked_loss_and_gradients_equal_the_plain_ones(chunk: LossChunk) -> None:
    for value, expected in zip(loss_and_gradients(chunk), loss_and_gradients("none"), strict=True):
        assert relative(value, expected) < 1e-6


@pytest.mark.parametrize("chunk", ["auto", 7])
def test_under_autocast_the_loss_is_the_plain_one_and_gradients_agree_to_bf16_rounding(
    chunk: LossChunk,
) -> None:
    loss, *gradients = loss_and_gradients(chunk, autocast=True)
    plain_loss, *plain_gradients = loss_and_gradients("none", autocast=True)
    assert relative(loss, plain_loss) < 1e-6
    for value, expected in zip(gradients, plain_gradients, strict=True):
        assert relative(value, expected) < 2**-7  # two roundings to 8 bits of mantissa, in another order
        assert value.dtype == torch.float32


def test_a_wrong_upstream_gradient_would_be_seen() -> None:
    assert relative(loss_and_gradients("auto", upstream=2.0)[1], loss_and_gradients("none")[1]) > 0.5


@pytest.fixture
def a_device_that_adds_unrounded() -> Iterator[None]:
    """The operation that torch has on some GPUs only, on the CPU: with its schema, and fp32 inside."""

    def kernel(
        total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, **rest: Any
    ) -> torch.Tensor:
        added: torch.Tensor = rest["out"].copy_(total + left.to(dtype) @ right.to(dtype))
        return added

    adds_unrounded.cache_clear()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("addmm.dtype_out", kernel, "CPU")
        yield
    adds_unrounded.cache_clear()


def test_16_bit_products_are_summed_unrounded_where_the_device_can(
    a_device_that_adds_unrounded: None,
) -> None:
    whole, chunked = (loss_and_gradients(chunk, autocast=True)[2] for chunk in ("auto", 1))
    assert relative(chunked, whole) < 1e-6  # 128 products and one: each rounded to 16 bits they differ


def test_16_bit_products_of_one_token_each_are_rounded_on_the_cpu() -> None:
    assert not adds_unrounded(torch.device("cpu"), torch.bfloat16)
    whole, chunked = (loss_and_gradients(chunk, autocast=True)[2] for chunk in ("auto", 1))
    assert 1e-4 < relative(chunked, whole) < 2**-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_compiler_sees_gives_the_same_numbers_and_leaves_it_one_loop(dtype: torch.dtype) -> None:
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    product = torch.randn(32, VOCABULARY, generator=torch.Generator().manual_seed(0)).to(dtype)
    targets = torch.arange(32).masked_fill(torch.arange(32) < 5, IGNORED_TARGET)
    compiled = torch.compile(loss_and_gradient, backend=compiler)(PLAIN, product.clone(), None, targets)
    for value, expected in zip(
        compiled[:2], loss_and_gradient(PLAIN, product, None, targets)[:2], strict=True
    ):
        assert torch.equal(value, expected)
    assert "sub_" in seen
    assert not [name for name in seen if "scatter" in name]  # it would split the loop over the gradient


def test_a_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    hidden = torch.randn(3, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    loss = projected_cross_entropy_sum(hidden, weight, torch.full((3,), IGNORED_TARGET), 2)
    loss.backward()
    assert float(loss) == 0.0
    assert hidden.grad is not None
    assert float(hidden.grad.abs().sum()) == 0.0


def test_the_full_logits_are_never_held() -> None:
    """Peak bytes of the tensors made, counted by a dispatch mode: far below tokens x vocabulary."""
    tokens, vocabulary, chunk = 2048, 4096, 64
    hidden = torch.randn(tokens, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor):
                largest = max(largest, output.numel())
            return output

    with Watch():  # type: ignore[no-untyped-call]
        projected_cross_entropy_sum(hidden, weight, targets, chunk).backward()
    assert largest <= chunk * vocabulary


def test_a_second_backward_fails_instead_of_scaling_twice() -> None:
    hidden = torch.randn(3, WIDTH, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    loss = projected_cross_entropy_sum(hidden, weight, torch.zeros(3, dtype=torch.int64), "auto")
    loss.backward(retain_graph=True)
    with pytest.raises(TypeError):
        loss.backward()


def test_without_gradients_only_the_loss_is_computed() -> None:
    hidden, weight = torch.randn(3, WIDTH), torch.randn(VOCABULARY, WIDTH)
    with torch.no_grad():
        loss = projected_cross_entropy_sum(hidden, weight, torch.zeros(3, dtype=torch.int64), "auto")
    assert not loss.requires_grad
    assert float(loss) > 0
