"""What a run says that ran out of memory, and what it advises."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from xtrain import registry
from xtrain.contract import Counter, Memory, Moment, OutOfMemory, Resolved, StepMemory
from xtrain.relief import about_checkpoint, describe_out_of_memory, helps_on
from xtrain.remedies import remedies
from xtrain.spec.tree import Spec

MIB = 1 << 20
FULL_OF_ALL = dict.fromkeys(("parameters", "master", "gradients", "optimizer", "activations", "logits"), MIB)


def spec(**changes: Any) -> Spec:
    tree = {
        "model": {"preset": "gpt2-nano"},
        "data": {"source": "synthetic"},
        "batch": {"global": 8, "micro": 1},
        "train": {"steps": 10},
        "optimizer": {"lr": 0.1},
    }
    return Spec.model_validate({**tree, **changes})


def helps(changed: Spec, key: str) -> bool:
    return True


def advised(
    moment: Moment = "step", held: Mapping[str, int] = FULL_OF_ALL, judge: Any = helps, **changes: Any
) -> list[str]:
    """What is to be set, without the remarks."""
    return [one.partition(" (")[0] for one in remedies(spec(**changes), moment, held, judge)]


BF16 = {"dtype": "bf16", "weights": "bf16"}
OFFLOADED = {"optimizer": "cpu", "gradients": "cpu", "activations": "cpu"}
NOTHING_ON: Any = {"batch": {"global": 8}, "memory": {"loss_chunk": "none"}}
LADDER = [
    "batch.micro: 4",
    "memory.loss_chunk: auto",
    "memory.optimizer_in_backward: true",
    "memory.checkpointing: auto",
    "memory.checkpointing: {every: 1}",
    "precision: {dtype: bf16, weights: bf16}",
    "memory.sharding: optimizer",
    "memory.sharding: gradients",
    "memory.offload.optimizer: cpu",
    "memory.offload.gradients: cpu",
    "memory.offload.activations: cpu",
    "memory.sharding: parameters",
]


def test_all_techniques_are_advised_in_the_order_of_their_cost() -> None:
    assert advised(**NOTHING_ON) == LADDER


IN_USE: list[tuple[dict[str, Any], set[str]]] = [
    ({"batch": {"global": 8, "micro": 1}}, {"batch.micro"}),
    ({"memory": {"loss_chunk": 64}}, {"memory.loss_chunk"}),
    ({"memory": {"checkpointing": {"every": 1}}}, {"memory.checkpointing"}),
    ({"memory": {"checkpointing": {"selective": {"ratio": 1.0}}}}, {"memory.checkpointing: {every"}),
    ({"precision": BF16}, {"precision"}),
    ({"memory": {"optimizer_in_backward": True}}, {"memory.optimizer_in_backward"}),
    ({"memory": {"offload": OFFLOADED}}, {"memory.offload"}),
    ({"memory": {"sharding": "parameters"}}, {"memory.sharding"}),
    ({"manual": {"devices": ["main", "cpu"]}}, {"memory.sharding: parameters"}),
]


@pytest.mark.parametrize(("changes", "gone"), IN_USE)
def test_what_the_spec_already_has_is_not_advised(changes: dict[str, Any], gone: set[str]) -> None:
    found = advised(**changes)
    assert found
    assert not [one for one in found if any(one.startswith(key) for key in gone)]


def test_groups_that_are_recomputed_can_become_smaller() -> None:
    found = advised(memory={"checkpointing": {"every": 2}})
    assert [one for one in found if "checkpointing" in one] == ["memory.checkpointing: {every: 1}"]


def test_the_next_micro_batch_divides_the_one_in_use() -> None:
    assert advised(batch={"global": 9, "micro": 9})[0] == "batch.micro: 3"


def test_fp16_stays_fp16() -> None:
    found = advised(precision={"dtype": "fp16", "weights": "fp32"})
    assert "precision: {dtype: fp16, weights: fp16}" in found


def test_layers_that_were_split_by_hand_can_be_split_by_what_fits() -> None:
    by_hand = {"devices": ["main", "cpu"], "split": [2, 2]}
    assert advised(manual=by_hand)[-1] == "manual.split: auto"


ONLY = {
    "activations": {"batch", "memory.checkpointing", "precision", "memory.offload.activations"},
    "logits": {"batch", "memory.loss_chunk", "precision"},
    "optimizer": {"memory.sharding: optimizer", "memory.sharding: gradients", "memory.offload.optimizer"},
    "gradients": {"memory.optimizer", "memory.sharding: gradients", "memory.offload.gradients"},
    "parameters": set(),
}
"""Beside dividing the model, which always helps."""


@pytest.mark.parametrize("category", ONLY)
def test_only_what_makes_the_full_categories_smaller_is_advised(category: str) -> None:
    found = advised(held={category: 99 * MIB, "other": 0}, **NOTHING_ON)
    assert found == [
        one
        for one in LADDER
        if one == "memory.sharding: parameters" or any(one.startswith(key) for key in ONLY[category])
    ]


MOMENTS: list[tuple[Moment, list[str]]] = [
    ("start", ["memory.sharding: parameters"]),
    (
        "update",
        [one for one in LADDER if "optimizer" in one or "gradients" in one or one.endswith("parameters")],
    ),
    (
        "evaluation",
        [
            "batch.micro: 4",
            "memory.loss_chunk: auto",
            "precision: {dtype: bf16, weights: bf16}",
            "memory.sharding: optimizer",
            "memory.sharding: gradients",
            "memory.offload.optimizer: cpu",
            "memory.sharding: parameters",
        ],
    ),
]


@pytest.mark.parametrize(("moment", "expected"), MOMENTS)
def test_only_what_helps_at_that_moment_is_advised(moment: Moment, expected: list[str]) -> None:
    assert advised(moment, {}, **NOTHING_ON) == expected


def test_16_bit_weights_ease_the_start_once_their_masters_are_elsewhere() -> None:
    assert "precision: {dtype: bf16, weights: bf16}" in advised(
        "start", {}, memory={"offload": {"optimizer": "cpu"}}
    )


AT_ONCE = "memory.optimizer_in_backward: true"


def test_what_the_backend_refuses_or_has_nothing_to_do_for_is_not_advised() -> None:
    on_cpu = helps_on(registry.load("cpu"), 1)
    assert advised(judge=on_cpu, **NOTHING_ON) == [one for one in LADDER[:6] if one != AT_ONCE]
    on_gpu = helps_on(registry.load("cuda"), 1)
    refused = (AT_ONCE, "memory.sharding: optimizer", "memory.sharding: gradients")
    assert advised(judge=on_gpu, **NOTHING_ON) == [one for one in LADDER if one not in refused]


def test_the_update_in_the_backward_pass_is_advised_where_nothing_comes_between() -> None:
    on_cpu = helps_on(registry.load("cpu"), 1)
    unclipped: dict[str, Any] = {"train": {"steps": 10, "clip": None}, "batch": {"global": 8}}
    assert AT_ONCE in advised(judge=on_cpu, **unclipped)
    assert AT_ONCE not in advised(judge=on_cpu, **{**unclipped, "batch": {"global": 8, "micro": 4}})
    in_use = {**unclipped, "memory": {"optimizer_in_backward": True}}
    assert "batch.micro: 4 with memory.optimizer_in_backward: false" in advised(judge=on_cpu, **in_use)


def test_offload_is_advised_with_what_the_backend_wants_beside_it() -> None:
    together = helps_on(registry.load("deepspeed"), 1)
    found = advised(judge=together)
    assert "memory.offload.optimizer: cpu with memory.sharding: optimizer" in found


FULL = OutOfMemory(
    "cuda:0", Memory(Counter(90 * MIB, None, "unavailable"), None, {"parameters": MIB}), "step"
)


def described(full: OutOfMemory, seen: StepMemory | None, saved: str = "") -> str:
    backend = registry.load("cpu")
    return describe_out_of_memory(full, seen, Resolved("cpu", spec(), 1), backend, saved)


def test_the_message_says_what_filled_the_device_and_what_to_try() -> None:
    seen = StepMemory(2, {"cuda:0": {"parameters": 10 * MIB, "activations": 70 * MIB, "logits": 0}})
    assert described(FULL, seen, about_checkpoint(None)).splitlines() == [
        "cuda:0 is out of memory in the middle of a step.",
        "  cuda:0 held 80.0 MiB: parameters 10.0 MiB, activations 70.0 MiB",
        "  live tensors at that moment: 90.0 MiB",
        "There is no checkpoint yet.",
        "Try, cheapest first:",
        "  memory.checkpointing: auto (the same losses for about a third more time)",
        "  memory.checkpointing: {every: 1} (block by block: usually the least memory)",
        "  precision: {dtype: bf16, weights: bf16} "
        "(halves most activations; the losses are those of this precision)",
    ]


def test_of_a_step_that_broke_off_nobody_knows_what_would_have_been_held() -> None:
    peaks = {"cuda:0": {"parameters": 70 * MIB}}
    assert "checkpointing" not in described(FULL, StepMemory(1, peaks))
    assert "checkpointing" in described(FULL, StepMemory(1, peaks, finished=False))


def test_without_a_counted_step_the_engine_says_what_it_holds(tmp_path: Path) -> None:
    message = described(FULL, None, about_checkpoint(tmp_path))
    assert "  cuda:0 held 90.0 MiB: parameters 1.0 MiB, other 89.0 MiB\n" in message
    assert "checkpointing" in message  # what the rest is nobody has seen
    assert f"The last checkpoint, {tmp_path}, is intact." in message


@pytest.mark.parametrize(
    ("moment", "when", "last_resort"),
    [
        ("start", "before the first step, while the model was put in its place.", "  a smaller model"),
        ("evaluation", "in the middle of an evaluation.", "  precision:"),
    ],
)
def test_outside_of_a_step_what_is_held_now_counts_and_not_a_step_before(
    moment: Moment, when: str, last_resort: str
) -> None:
    seen = StepMemory(2, {"cuda:0": {"activations": 70 * MIB}})
    lines = described(OutOfMemory(FULL.device, FULL.memory, moment), seen).splitlines()
    assert lines[0] == f"cuda:0 is out of memory {when}"
    assert lines[1] == "  cuda:0 held 90.0 MiB: parameters 1.0 MiB, other 89.0 MiB"
    assert lines[-1].startswith(last_resort)
