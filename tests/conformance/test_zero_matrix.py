"""ZeRO 0-3 x offload x processes x precision: every cell is the plain training, or refused by name.

What is not offloaded is in test_parity.py; here are the cells that offload to the CPU, and the table in
docs/conformance.md, which is made from `matrix()` below.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.cases import (
    ADAMW,
    BITING_CLIP,
    EVALUATED,
    PLANTED_LOSS,
    SGD_CLIPPED,
    SGD_UNCLIPPED,
    SHARDING,
    Lane,
    Training,
)
from tests.conformance.plain import Curve, train
from tests.conformance.test_parity import FP32_TOLERANCE, MIXED_TOLERANCE
from tests.jobs import ROOT
from xtrain import registry
from xtrain.spec.check import check_spec
from xtrain.spec.tree import Spec

TABLE = ROOT / "docs" / "conformance.md"
BEGIN, END = "<!-- matrix -->\n", "<!-- end -->\n"

HOST = ("optimizer", "gradients")
WORLDS = (1, 2)
PLACES: dict[str, tuple[str, ...]] = {
    "nothing offloaded": (),
    "optimizer offloaded": HOST,
    "parameters offloaded": ("parameters",),
    "both offloaded": (*HOST, "parameters"),
}
STEADY = {"dtype": "fp16", "initial_scale_power": 8}
"""A scale at which nothing overflows; scales that move are in test_parity.py."""
PRECISIONS: dict[str, Any] = {
    "fp32": "fp32",
    "bf16 autocast": "bf16",
    "bf16 weights": {"dtype": "bf16", "weights": "bf16"},
    "fp16": STEADY,
}
STEPS = 10
FP32 = [
    Training("adamw", ADAMW, steps=STEPS),
    Training("sgd", SGD_UNCLIPPED, clip=None, steps=STEPS),
    Training("sgd-clipped", SGD_CLIPPED, clip=BITING_CLIP, steps=STEPS),
]
LOWER = [
    Training(f"adamw-{name}", ADAMW, precision=value, steps=STEPS)
    for name, value in PRECISIONS.items()
    if name != "fp32"
]
SPIKED = replace(PLANTED_LOSS, steps=STEPS, loss_factors={6: 9.0})
HELD_OUT = replace(EVALUATED, steps=STEPS)
REFERENCE = Lane("cpu")


def spec_of(precision: Any, sharding: str, offload: tuple[str, ...], world: int) -> Spec:
    lane = Lane("deepspeed", sharding, world, offload)
    return Spec.model_validate(Training("any", precision=precision).on(lane).spec)


def cell(precision: Any, sharding: str, offload: tuple[str, ...]) -> str:
    """What the backend says of it, for any number of processes."""
    backend = registry.load("deepspeed")
    specs = [(spec_of(precision, sharding, offload, world), world) for world in WORLDS]
    problems = [
        problem
        for spec, world in specs
        for problem in (*check_spec(spec, world), *backend.problems(spec, world))
    ]
    if problems:
        return f"refused: {problems[0].nearest}"
    stages = {backend.resolve(spec, world).settings["zero_stage"] for spec, world in specs}
    return "proven" if stages == {SHARDING.index(sharding)} else "proven, as stage 1"


def matrix() -> str:
    """Markdown: a row for each stage and place, a column for each precision."""
    lines = [f"| ZeRO | | {' | '.join(PRECISIONS)} |", f"|---|---|{'---|' * len(PRECISIONS)}"]
    for stage, sharding in enumerate(SHARDING):
        for place, offload in PLACES.items():
            cells = [cell(precision, sharding, offload) for precision in PRECISIONS.values()]
            lines.append(f"| {stage} | {place} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def honoured_lanes(world: int) -> list[Lane]:
    """Those with offload that are not refused in fp32."""
    return [
        Lane("deepspeed", sharding, world, offload)
        for sharding in SHARDING
        for offload in PLACES.values()
        if offload and cell("fp32", sharding, offload) == "proven"
    ]


LANES = [lane for world in WORLDS for lane in honoured_lanes(world)]


def test_the_table_in_the_documentation_is_what_the_backend_says() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0] == matrix()


def test_stages_1_to_3_offload_the_optimizer_and_only_stage_3_parameters() -> None:
    assert sorted({(lane.sharding, lane.offload) for lane in LANES}) == sorted(
        [
            *((sharding, HOST) for sharding in SHARDING[1:]),
            ("parameters", ("parameters",)),
            ("parameters", (*HOST, "parameters")),
        ]
    )


class Lanes:
    """Every lane's results: one job of one process, one of two."""

    def __init__(self, run: Callable[..., tuple[dict[str, Any], Path]]) -> None:
        wanted = [*FP32, *LOWER, SPIKED, HELD_OUT]
        alone = [training.on(lane) for lane in (REFERENCE, *honoured_lanes(1)) for training in wanted]
        together = [training.on(lane) for lane in honoured_lanes(2) for training in wanted]
        self.results = run(alone, 1)[0] | run(together, 2)[0]

    def of(self, training: Training, lane: Lane) -> dict[str, Any]:
        found: dict[str, Any] = self.results[f"{training.name}@{lane}"]
        return found


@pytest.fixture(scope="module")
def lanes(run_cases: Callable[..., tuple[dict[str, Any], Path]]) -> Lanes:
    return Lanes(run_cases)


@cache
def anchor(name: str) -> Curve:
    training = next(t for t in FP32 if t.name == name)
    return train(Spec.model_validate(training.on(REFERENCE).spec))


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(expected) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("training", FP32, ids=lambda t: t.name)
def test_offloaded_fp32_equals_a_plain_loop(training: Training, lane: Lane, lanes: Lanes) -> None:
    found, expected = lanes.of(training, lane), anchor(training.name)
    assert difference(found["losses"], expected.losses) <= FP32_TOLERANCE
    assert difference(found["norms"], expected.norms) <= FP32_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("training", LOWER, ids=lambda t: t.name)
def test_offloaded_mixed_precision_stays_in_its_band(training: Training, lane: Lane, lanes: Lanes) -> None:
    """bf16 weights are held against the manual engine's `weights: bf16`, fp16 against its fp16."""
    found, expected = lanes.of(training, lane), lanes.of(training, REFERENCE)
    assert difference(found["losses"], expected["losses"]) <= MIXED_TOLERANCE
    assert found["skipped"] == expected["skipped"] == [False] * STEPS


@pytest.mark.slow
@pytest.mark.parametrize("lane", LANES, ids=str)
def test_a_loss_spike_is_skipped_at_the_same_steps_with_offload(lane: Lane, lanes: Lanes) -> None:
    found, expected = lanes.of(SPIKED, lane), lanes.of(SPIKED, REFERENCE)
    assert found["skipped"] == expected["skipped"] == [step == 6 for step in range(STEPS)]
    assert found["losses"][-1] == pytest.approx(expected["losses"][-1], rel=FP32_TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("lane", LANES, ids=str)
def test_the_held_out_loss_is_the_same_with_offload(lane: Lane, lanes: Lanes) -> None:
    found, expected = (lanes.of(HELD_OUT, one)["eval_losses"][-1] for one in (lane, REFERENCE))
    assert found == pytest.approx(expected, rel=FP32_TOLERANCE)
