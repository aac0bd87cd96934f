"""What is decided about DeepSpeed on a Mac, with the facts as arguments: there is no Mac to try it on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from backends.deepspeed.apple import Mac, decide, mac_notes, mac_problems
from tests.small_specs import make_spec

MAC = Mac(macos=(15, 1), torch=(2, 13, 0), deepspeed=(0, 19, 8), has_mps=True)


def test_a_mac_with_a_gpu_is_offered_only_when_named_and_says_that_nobody_tried_it() -> None:
    found = decide(MAC)
    assert found.usable
    assert found.preference is None
    assert found.reason == "DeepSpeed 0.19.8 on MPS, one process; not tried on real hardware"


def test_macos_13_is_offered_without_bf16() -> None:
    assert "no bf16 before macOS 14" in decide(replace(MAC, macos=(13, 6))).reason


@pytest.mark.parametrize(
    ("mac", "reason"),
    [
        (replace(MAC, has_mps=False), "needs a GPU that torch can use"),
        (replace(MAC, torch=(2, 4, 1)), "needs torch 2.5"),
        (replace(MAC, deepspeed=(0, 18, 3)), "install 0.19, or use mps"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason_and_another_backend(mac: Mac, reason: str) -> None:
    found = decide(mac)
    assert not found.usable
    assert reason in found.reason
    assert "use " in found.reason


@pytest.mark.parametrize("sharding", ["none", "optimizer", "gradients", "parameters"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_stage_and_precision_is_taken_on_one_process(sharding: str, precision: str) -> None:
    spec = make_spec(memory={"sharding": sharding}, precision=precision)
    assert list(mac_problems(spec, 1, MAC.macos)) == []


@pytest.mark.parametrize(
    ("path", "sections", "world", "macos"),
    [
        ("launch.processes", {}, 2, (15, 0)),
        ("precision", {"precision": "bf16"}, 1, (13, 6)),
        (
            "memory.offload.optimizer.device",
            {
                "memory": {
                    "sharding": "parameters",
                    "offload": {"optimizer": {"device": "nvme", "path": "/drive"}},
                }
            },
            1,
            (15, 0),
        ),
    ],
)
def test_what_a_mac_cannot_do_is_refused_by_name(
    path: str, sections: dict[str, Any], world: int, macos: tuple[int, ...]
) -> None:
    (problem,) = mac_problems(make_spec(**sections), world, macos)
    assert problem.path == path
    assert problem.nearest


def test_offload_on_unified_memory_says_what_it_buys() -> None:
    spec = make_spec(memory={"sharding": "optimizer", "offload": {"optimizer": "cpu"}})
    assert any("frees no physical byte" in note for note in mac_notes(spec))
    assert not any("frees no physical byte" in note for note in mac_notes(make_spec()))
