"""What a run says that ran out of memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from xtrain.contract import Counter, Memory, OutOfMemory, StepMemory
from xtrain.relief import describe_out_of_memory, next_technique
from xtrain.spec.tree import Spec

MIB = 1 << 20


def spec(**changes: Any) -> Spec:
    tree = {
        "model": {"preset": "gpt2-nano"},
        "data": {"source": "synthetic"},
        "batch": {"global": 8, "micro": 1},
        "train": {"steps": 10},
        "optimizer": {"lr": 0.1},
    }
    return Spec.model_validate({**tree, **changes})


def accepts(changed: Spec) -> bool:
    return False


CHECKPOINTED = {"checkpointing": "auto"}
LADDER = [
    ({"batch": {"global": 8}}, "batch.micro: 4 (the global batch and what is learned stay the same)"),
    ({"batch": {"global": 9, "micro": 9}}, "batch.micro: 3 ("),
    ({"memory": {"loss_chunk": "none"}}, "memory.loss_chunk: auto ("),
    ({}, "memory.checkpointing: auto (the same losses for about a third more time)"),
    ({"memory": CHECKPOINTED}, "precision: bf16 ("),
    ({"memory": CHECKPOINTED, "precision": "bf16"}, "memory.offload.optimizer: cpu ("),
    (
        {"memory": {**CHECKPOINTED, "offload": {"optimizer": "cpu"}}, "precision": "bf16"},
        "memory.sharding: parameters (",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), LADDER)
def test_the_next_technique_is_the_cheapest_not_yet_in_use(changes: Any, expected: str) -> None:
    assert next_technique(spec(**changes), accepts).startswith(expected)


def test_what_the_backend_refuses_is_not_advised() -> None:
    found = next_technique(spec(), lambda changed: changed.precision.dtype == "fp32")
    assert found.startswith("precision: bf16")
    assert next_technique(spec(), lambda changed: True) == "a shorter data.seq_len, or a smaller model"


FULL = OutOfMemory("cuda:0", Memory(Counter(90 * MIB, None, "unavailable"), None, {"parameters": MIB}), True)


def test_the_message_says_what_filled_the_device_and_what_to_try() -> None:
    seen = StepMemory(2, {"cuda:0": {"parameters": 10 * MIB, "activations": 70 * MIB, "logits": 0}})
    message = describe_out_of_memory(FULL, seen, spec(), accepts, None)
    assert message.splitlines() == [
        "cuda:0 is out of memory in the middle of a step.",
        "  cuda:0 held 80.0 MiB: parameters 10.0 MiB, activations 70.0 MiB",
        "  live tensors at that moment: 90.0 MiB",
        "There is no checkpoint yet. Try memory.checkpointing: auto "
        "(the same losses for about a third more time)",
    ]


def test_without_a_counted_step_the_engine_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "step-00000004").mkdir()
    message = describe_out_of_memory(FULL, None, spec(), accepts, tmp_path)
    assert "  cuda:0 held 1.0 MiB: parameters 1.0 MiB\n" in message
    assert f"The last checkpoint, {tmp_path / 'step-00000004'}, is intact." in message
