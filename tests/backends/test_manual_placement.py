"""Layer sharding, on what a request can get wrong; that it trains alike is in tests/conformance."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from backends.manual.chain import check_chain
from backends.manual.devices import Cpu
from backends.manual.estimate import estimate_bytes
from backends.manual.placement import Placement, place, plan_placement
from tests.small_runs import run
from xtrain import registry
from xtrain.errors import RequestError
from xtrain.models.source import model_source
from xtrain.records.record import load_record
from xtrain.spec.tree import Spec

HOME, AWAY = torch.device("cpu"), torch.device("meta")

SPEC: dict[str, Any] = {
    "model": {"preset": "gpt2-nano", "layers": 4, "hidden": 16, "heads": 2},
    "data": {"source": "synthetic", "seq_len": 32},
    "batch": {"global": 4, "micro": 2},
    "train": {"steps": 2},
    "optimizer": {"lr": 1e-3},
}


def spec(**changes: Any) -> Spec:
    return Spec.model_validate({**SPEC, **changes})


class Layers(nn.Module):
    """A stem, four blocks, a head; subclasses call them in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.head = nn.Linear(4, 10)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.run(self.stem(tokens))).flatten(0, 1), targets[0])

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return hidden


class OutOfOrder(Layers):
    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        for number in (0, 2, 1, 3):
            hidden = self.blocks[number](hidden)
        return hidden


class Twice(Layers):
    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().run(super().run(hidden))


class Parallel(Layers):
    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([block(hidden) for block in self.blocks]).sum(0)


class Skipped(Layers):
    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](hidden)  # type: ignore[no-any-return]


class SharedLayer(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[3].weight = self.blocks[0].weight


def test_blocks_that_chain_are_accepted() -> None:
    model = Layers()
    check_chain(model, list(model.blocks), 32)


@pytest.mark.parametrize(
    ("model", "fault"),
    [
        (OutOfOrder(), r"a pass calls blocks \[0, 2, 1, 3\], of 4"),
        (Twice(), r"a pass calls blocks \[0, 1, 2, 3, 0, 1, 2, 3\], of 4"),
        (Skipped(), r"a pass calls blocks \[0\], of 4"),
        (Parallel(), "block 1 is called with something else"),
    ],
)
def test_blocks_that_do_not_chain_are_refused_with_what_was_found(model: Layers, fault: str) -> None:
    with pytest.raises(RequestError, match=f"do not chain: {fault}; expected each .* use manual.devices"):
        check_chain(model, list(model.blocks), 32)


def test_looking_at_the_chain_changes_no_buffer_and_leaves_no_hook() -> None:
    model = Layers()
    model.blocks[1] = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(8))
    check_chain(model, list(model.blocks), 32)
    assert int(model.blocks[1][1].num_batches_tracked) == 0  # type: ignore[index]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_each_block_goes_to_its_place_and_the_rest_stays_home() -> None:
    model = Layers()
    places = [HOME, HOME, AWAY, AWAY]
    place(model, Placement(HOME, list(model.blocks), places))
    found = [next(block.parameters()).device for block in model.blocks]
    assert found == places
    assert model.stem.weight.device == model.head.weight.device == HOME


def test_a_placement_says_how_many_blocks_are_where() -> None:
    placement = Placement(HOME, list(Layers().blocks), [HOME, AWAY, AWAY, HOME])
    assert placement.notes() == [
        "layers over devices: stem and head on cpu; of 4 blocks 1 on cpu, 2 on meta, 1 on cpu"
    ]
    assert Placement(HOME).notes() == []


def test_a_run_s_record_has_that_note(tmp_path: Path) -> None:
    out = tmp_path / "out"
    split: dict[str, Any] = {"manual": "{devices: [main, cpu]}", "model__layers": 2, "train__steps": 1}
    result = run(tmp_path, "--out", out, backend="cpu", **split)
    note = "layers over devices: stem and head on cpu; of 2 blocks 2 on cpu"
    assert f"note: {note}\n" in result.stderr
    assert note in load_record(out).notes


ONE_DEVICE: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "cuda",
        {"memory": {"sharding": "parameters"}, "manual": {"devices": ["main"]}},
        "memory.sharding",
        "memory.sharding: parameters does nothing here: manual.devices names one device, cuda",
    ),
    (
        "cpu",
        {"memory": {"sharding": "parameters"}},
        "memory.sharding",
        "memory.sharding: layers over devices, but all of them are cpu, so no memory is saved",
    ),
    (
        "cpu",
        {"manual": {"devices": ["main", "cpu"]}},
        "manual.devices",
        "manual.devices: layers over devices, but all of them are cpu, so no memory is saved",
    ),
]


@pytest.mark.parametrize(("backend", "changes", "key", "note"), ONE_DEVICE)
def test_layers_over_one_device_are_said_to_save_nothing(
    backend: str, changes: dict[str, Any], key: str, note: str
) -> None:
    resolved = registry.load(backend).resolve(spec(**changes), 1)
    assert list(resolved.notes) == [note]
    assert list(resolved.idle) == [key]


def test_layers_over_two_devices_have_something_to_do() -> None:
    resolved = registry.load("cuda").resolve(spec(memory={"sharding": "parameters"}), 1)
    assert (list(resolved.notes), list(resolved.idle)) == ([], [])


@pytest.mark.parametrize("sharding", ["none", "parameters"])
def test_weights_that_should_travel_are_refused_with_advice_that_works(sharding: str) -> None:
    asked = spec(memory={"sharding": sharding, "offload": {"parameters": "cpu"}})
    (problem,) = registry.load("cpu").problems(asked, 1)
    assert problem.nearest.startswith("leave it out: memory.sharding: parameters alone puts layers")
    assert not registry.load("cpu").problems(spec(memory={"sharding": "parameters"}), 1)


def test_a_weight_of_two_blocks_that_are_apart_is_refused() -> None:
    model = SharedLayer()
    with pytest.raises(RequestError, match=r"block 3 on meta, but it shares a parameter with .* on cpu"):
        place(model, Placement(HOME, list(model.blocks), [HOME, HOME, HOME, AWAY]))


def test_a_model_without_blocks_cannot_be_spread() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    sharded = spec(manual={"devices": ["main", "cpu"]})
    with pytest.raises(RequestError, match=r"manual.devices: the blocks of this model cannot be found"):
        plan_placement(Whole(), sharded, [Cpu(), Cpu()])


def test_more_layers_asked_for_than_a_users_model_has() -> None:
    sharded = spec(manual={"devices": ["main", "cpu"], "split": [4, 4]})
    with pytest.raises(
        RequestError, match=r"manual.split: found \[4, 4\], which sum to 8, expected .* 4 blocks"
    ):
        plan_placement(Layers(), sharded, [Cpu(), Cpu()])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "found gpu, expected main .* use main"),
        ("cuda:x", "found cuda:x, expected main"),
        ("cpu:1", "found cpu:1, expected main"),
        ("mian", "found mian, .* use main"),
    ],
)
def test_a_device_that_does_not_exist_is_named_before_the_run(name: str, message: str) -> None:
    problems = registry.load("cpu").problems(spec(manual={"devices": ["main", name]}), 1)
    assert [problem.path for problem in problems] == ["manual.devices"]
    assert re.search(message, str(problems[0]))


def test_a_device_that_is_not_on_this_machine_is_named_when_the_run_starts() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    from xtrain.contract import Job

    backend, sharded = registry.load("cpu"), spec(manual={"devices": ["main", "cuda:7"]})
    with pytest.raises(RequestError, match=r"manual.devices: cuda:7 cannot be used here: "):
        backend.start(backend.resolve(sharded, 1), model_source(sharded, 257), Job())


def test_the_estimate_counts_state_by_hand() -> None:
    """fp32 AdamW: 16 bytes a parameter; with bf16 weights 2 + 4 + 4 + 8; offloaded 2."""
    model = model_source(spec(), 257).build()
    blocks = list(model.blocks)  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in blocks[0].parameters())
    sixteen = {"dtype": "bf16", "weights": "bf16"}
    offload = {"optimizer": "cpu", "gradients": "cpu", "activations": "cpu"}
    for changes, by_parameter in (
        ({"memory": {"offload": {"activations": "cpu"}}}, 16),
        ({"memory": {"offload": {"activations": "cpu"}}, "precision": sixteen}, 18),
        ({"memory": {"offload": offload}, "precision": sixteen}, 2),
        ({"memory": {"offload": offload}}, 4),
    ):
        found = estimate_bytes(model, blocks, spec(**changes))
        assert list(found.blocks) == [by_parameter * parameters] * 4


def test_the_estimate_measures_activations_and_sees_what_recomputing_saves() -> None:
    model = model_source(spec(), 257).build()
    blocks = list(model.blocks)  # type: ignore[arg-type]
    plain = estimate_bytes(model, blocks, spec())
    twice = estimate_bytes(model, blocks, spec(batch={"global": 4, "micro": 4}))
    grouped = estimate_bytes(model, blocks, spec(memory={"checkpointing": {"every": 2}}))
    state = 16 * sum(p.numel() for p in blocks[0].parameters())
    kept = plain.blocks[0] - state
    assert twice.blocks[0] - state == 2 * kept
    hidden_bytes = 2 * 32 * 16 * 4
    assert kept > 10 * hidden_bytes
    assert grouped.blocks[0] - state == hidden_bytes
    assert grouped.recomputed == 2 * kept
