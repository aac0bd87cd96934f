"""The hand-written engine's state: out by name, and back in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from backends.manual.optimizer import build_optimizer
from backends.manual.precision import round_weights
from backends.manual.state import export_state, import_state, set_step_counts, step_counts
from backends.manual.weights import Weights
from backends.step_counts import StepCounts, stored_counts
from xtrain.contract import StateKind
from xtrain.spec.tree import SGD, AdamW, Optimizer, Precision

ADAMW = AdamW(lr=0.1)
SGD_MOMENTUM = SGD(name="sgd", lr=0.1, momentum=0.9)
FP32 = Precision()
BF16_WEIGHTS = Precision.model_validate({"dtype": "bf16", "weights": "bf16"})

State = dict[tuple[str, StateKind], torch.Tensor]


class Model(nn.Module):
    """A trained matrix and vector, a frozen vector, a buffer of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 2))
        self.vector = nn.Parameter(torch.randn(2))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("counts", torch.tensor([1, 2]))


class Source:
    description = "a test's"

    def build(self) -> nn.Module:
        raise NotImplementedError

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1


class Stored:
    """The contract's StateReader over a dictionary."""

    def __init__(self, state: Mapping[tuple[str, StateKind], torch.Tensor]) -> None:
        self.state = state

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        return self.state.get((name, kind))


class Training:
    def __init__(self, section: Optimizer, seed: int, precision: Precision = FP32) -> None:
        torch.manual_seed(seed)
        self.model = Model()
        round_weights(self.model, precision)
        self.weights = Weights(self.model)
        self.optimizer = build_optimizer(section, self.weights.updated, Source(), fused=False)

    def update(self, times: int = 1) -> Training:
        for number in range(times):
            (
                self.model.matrix.float().pow(2).sum() * (number + 1) + self.model.vector.float().sum()
            ).backward()
            self.weights.gradients()
            self.optimizer.step()
            self.weights.publish()
            self.weights.clear_gradients()
        return self

    def update_vector(self) -> Training:
        """A step at which the matrix has no gradient."""
        self.model.vector.float().sum().backward()
        self.weights.gradients()
        self.optimizer.step()
        self.weights.publish()
        self.weights.clear_gradients()
        return self

    def state(self) -> State:
        exported = export_state(self.model, self.weights, self.optimizer)
        return {(piece.name, piece.kind): piece.value.clone() for piece in exported}

    def counts(self) -> StepCounts:
        return step_counts(self.weights, self.optimizer)

    def load(self, state: State, steps: int | StepCounts) -> Training:
        counts = StepCounts(steps, {}) if isinstance(steps, int) else steps
        import_state(self.model, self.weights, self.optimizer, Stored(state))
        set_step_counts(self.weights, self.optimizer, counts)
        return self


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


@pytest.mark.parametrize("section", [ADAMW, SGD_MOMENTUM], ids=["adamw", "sgd"])
@pytest.mark.parametrize("precision", [FP32, BF16_WEIGHTS], ids=["fp32", "bf16 weights"])
def test_what_is_brought_back_goes_on_bit_for_bit(section: Optimizer, precision: Precision) -> None:
    first = Training(section, 1, precision).update(3)
    second = Training(section, 2, precision).load(first.state(), first.counts())
    assert_equal(second.state(), first.state())
    assert_equal(second.update(2).state(), first.update(2).state())
    for mine, theirs in zip(second.model.parameters(), first.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("precision", [FP32, BF16_WEIGHTS], ids=["fp32", "bf16 weights"])
def test_a_parameter_without_a_gradient_at_times_goes_on_bit_for_bit(precision: Precision) -> None:
    first = Training(ADAMW, 1, precision).update(2).update_vector()
    extras = first.counts().as_extras()
    assert extras == {"optimizer_steps": 3, "optimizer_steps_of": {"matrix": 2}}
    second = Training(ADAMW, 2, precision).load(first.state(), stored_counts(extras))
    third = Training(ADAMW, 2, precision).load(first.state(), 3)  # as if the counts were one
    expected = first.update(2).state()
    assert_equal(second.update(2).state(), expected)
    assert not torch.equal(third.update(2).state()["matrix", "weight"], expected["matrix", "weight"])


def test_a_parameter_that_never_had_a_gradient_has_no_updates() -> None:
    first = Training(ADAMW, 1).update_vector()
    assert first.counts() == StepCounts(1, {"matrix": 0})
    second = Training(ADAMW, 2).load(first.state(), first.counts())
    assert_equal(second.update(2).state(), first.update(2).state())


@pytest.mark.parametrize(
    "extras",
    [
        {"optimizer_steps": "3"},
        {"optimizer_steps": -1},
        {"optimizer_steps": True},
        {"optimizer_steps": 3, "optimizer_steps_of": {"matrix": 4}},
        {"optimizer_steps": 3, "optimizer_steps_of": {"matrix": 1.5}},
        {"optimizer_steps": 3, "optimizer_steps_of": ["matrix"]},
    ],
)
def test_counts_that_are_none_are_refused(extras: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"found .*, expected "):
        stored_counts(extras)


def test_the_state_is_whole_and_fp32_and_frozen_parameters_have_no_moments() -> None:
    state = Training(ADAMW, 1, BF16_WEIGHTS).update().state()
    trained = [(name, kind) for name in ("matrix", "vector") for kind in ("weight", "exp_avg", "exp_avg_sq")]
    assert set(state) == {*trained, ("frozen", "weight"), ("counts", "buffer")}
    assert {value.dtype for (_, kind), value in state.items() if kind != "buffer"} == {torch.float32}
    assert state["counts", "buffer"].dtype == torch.int64


def test_a_master_keeps_what_16_bits_would_round_away() -> None:
    training = Training(ADAMW, 1, BF16_WEIGHTS).update()
    master = training.state()["matrix", "weight"]
    assert not torch.equal(master, master.bfloat16().float())
    assert torch.equal(training.model.matrix, master.bfloat16())


def test_before_the_first_update_there_are_no_moments_and_none_are_needed() -> None:
    first = Training(ADAMW, 1)
    state = first.state()
    assert {kind for _, kind in state} == {"weight", "buffer"}
    second = Training(ADAMW, 2).load(state, 0)
    assert_equal(second.update().state(), first.update().state())


@pytest.mark.parametrize(("before", "after"), [(SGD_MOMENTUM, ADAMW), (ADAMW, SGD_MOMENTUM)])
def test_another_optimizer_takes_the_weights_and_begins_its_own_moments(
    before: Optimizer, after: Optimizer
) -> None:
    old = Training(before, 1).update(2).state()
    weights = {key: value for key, value in old.items() if key[1] in ("weight", "buffer")}
    expected = Training(after, 2).load(weights, 0).update()
    assert_equal(Training(after, 3).load(old, 2).update().state(), expected.state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({("vector", "weight"): None}, "the state has no weight of vector"),
        ({("counts", "buffer"): None}, "the state has no buffer of counts"),
        (
            {("matrix", "weight"): torch.zeros(2, 3)},
            r"weight of matrix: found \(2, 3\), expected \(3, 2\)",
        ),
        (
            {("vector", "exp_avg"): torch.zeros(3)},
            r"exp_avg of vector: found \(3,\), expected \(2,\)",
        ),
        ({("matrix", "exp_avg_sq"): None}, "the state has no exp_avg_sq of matrix"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[Any, Any], message: str) -> None:
    state = {**Training(ADAMW, 1).update().state(), **change}
    stored = {key: value for key, value in state.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        Training(ADAMW, 2).load(stored, 1)
