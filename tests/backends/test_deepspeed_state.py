"""DeepSpeed's state by name, as far as it needs neither DeepSpeed nor a process: stage 0."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from backends.deepspeed.shards import Shards, shards_of
from backends.deepspeed.state import export_state, import_state, state_layout
from backends.step_counts import StepCounts
from xtrain.contract import StateKey, StateKind

State = dict[StateKey, torch.Tensor]


class Stored:
    def __init__(self, state: State) -> None:
        self.state = state

    def read(self, name: str, kind: StateKind) -> torch.Tensor | None:
        return self.state.get((name, kind))


def shards(updates: int) -> Shards:
    """Of a model with a layer that is never used, after so many updates."""
    torch.manual_seed(updates)
    module = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    for _ in range(updates):
        module["used"](torch.ones(3)).sum().backward()
        optimizer.step()
    return shards_of(SimpleNamespace(module=module, optimizer=optimizer), stage=0)


def exported(one: Shards, rank: int = 0) -> State:
    return {
        (piece.name, piece.kind): piece.value.clone() for piece in export_state(one, rank, lambda name: 0)
    }


def test_a_parameter_that_was_never_updated_travels_without_moments() -> None:
    before = shards(2)
    state = exported(before)
    assert ("unused.weight", "weight") in state
    assert not [name for name, kind in state if name.startswith("unused") and kind != "weight"]
    assert set(state_layout(before)) == set(state)
    after = shards(0)
    import_state(after, Stored(state))
    found = exported(after)
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert not found["unused.weight", "exp_avg"].any()


def test_without_zero_updates_are_counted_for_each_parameter() -> None:
    before, after = shards(2), shards(0)
    counts = before.step_counts()
    assert counts == StepCounts(2, {"unused.weight": 0, "unused.bias": 0})
    import_state(after, Stored(exported(before)))
    assert after.set_step_counts(counts) == []
    assert after.step_counts() == counts


def test_zero_counts_for_all_together_and_says_what_it_cannot_carry() -> None:
    flat = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.AdamW([flat])
    flat.sum().backward()
    optimizer.step()
    zero = SimpleNamespace(optimizer=optimizer, single_partition_of_fp32_groups=[flat])
    one = shards_of(SimpleNamespace(optimizer=zero), stage=1)
    assert one.step_counts() == StepCounts(1, {})
    (said,) = one.set_step_counts(StepCounts(7, {"b": 5, "a": 3}))
    assert said.startswith(
        "the checkpoint has 2 parameters that were updated fewer times than the others (a 3"
    )
    assert one.step_counts() == StepCounts(7, {})
    assert one.set_step_counts(StepCounts(7, {})) == []


def test_half_of_a_parameters_moments_is_refused() -> None:
    state = exported(shards(2))
    del state["used.weight", "exp_avg_sq"]
    with pytest.raises(ValueError, match=r"the state has no exp_avg_sq of used\.weight"):
        import_state(shards(0), Stored(state))


def test_what_every_rank_has_comes_from_its_owner_alone() -> None:
    assert exported(shards(1), rank=1) == {}
