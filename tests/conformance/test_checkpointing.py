"""Recomputing activations changes no training: on any engine, ZeRO stage, number of processes or precision.

Each way is held against the plain loop, and against the same lane without it: there the arithmetic is
the same, so the numbers must be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance.cases import FP16, SGD_UNCLIPPED, SHARDING, Lane, Training
from tests.conformance.plain import Curve, train
from xtrain import registry
from xtrain.spec.tree import Spec

pytestmark = pytest.mark.slow

PLAIN_TOLERANCE = 1e-5
SAME_ARITHMETIC = 1e-6
"""Relative; measured: 0 in every lane."""

MODEL = {"preset": "gpt2-nano", "layers": 4, "hidden": 64, "heads": 2}
WAYS: dict[str, Any] = {
    "none": "none",
    "each": {"every": 1},
    "groups": {"every": 3},
    "number": {"number": 3},
    "auto": "auto",
    "ratio": {"selective": {"ratio": 0.5}},
    "ops": {"selective": {"ops": "cheap"}},
}
SGD: dict[str, Any] = {"optimizer": SGD_UNCLIPPED, "clip": None, "accumulation": 2}
SHORT: dict[str, Any] = {**SGD, "steps": 6, "schedule": {"name": "cosine", "warmup": 2}}
KINDS: dict[str, dict[str, Any]] = {
    "sgd": SGD,
    "short": SHORT,
    "dropout": {**SHORT, "model": {**MODEL, "dropout": 0.1}, "audited": True},
    "bf16": {**SHORT, "precision": "bf16"},
    "bf16-weights": {**SHORT, "precision": {"dtype": "bf16", "weights": "bf16"}},
    "fp16": {**SHORT, "precision": FP16},
    "one-update": {"steps": 1, "schedule": {"name": "constant"}, "keep_weights": True},
}
BY_HAND = [
    Lane("cpu"),
    *(Lane(name) for name, found in registry.survey().items() if name in ("cuda", "mps") and found.usable),
]
ALONE = [*BY_HAND, *(Lane("deepspeed", sharding) for sharding in SHARDING)]
TOGETHER = [Lane("deepspeed", sharding, world=2) for sharding in ("gradients", "parameters")]
LANES = ALONE + TOGETHER


def ways_on(lane: Lane, kind: str) -> list[str]:
    """All of them in a short training; elsewhere the two that work differently."""
    if kind == "short":
        return list(WAYS) if lane in ALONE else []
    if lane in BY_HAND or kind in ("sgd", "one-update") or (lane.sharding == "parameters" and lane in ALONE):
        return ["none", "groups", "ops"]
    return []


EVERYTHING = [(lane, kind, way) for lane in LANES for kind in KINDS for way in ways_on(lane, kind)]
FP32_RUNS = [one for one in EVERYTHING if one[1] in ("sgd", "short")]
RECOMPUTED = [one for one in EVERYTHING if one[2] != "none"]


def label(value: object) -> str:
    return str(value)


def training(kind: str, way: str) -> Training:
    fields = {"model": MODEL, **KINDS[kind]}
    return Training(f"{kind}-{way}", memory={"checkpointing": WAYS[way]}, **fields)


class Lanes:
    """Every lane's results, each job started once."""

    def __init__(self, run: Callable[..., tuple[dict[str, Any], Path]]) -> None:
        self.jobs = {world: run(self._cases(world), world) for world in (1, 2)}

    def _cases(self, world: int) -> list[Any]:
        return [training(kind, way).on(lane) for lane, kind, way in EVERYTHING if lane.world == world]

    def of(self, lane: Lane, kind: str, way: str) -> dict[str, Any]:
        found: dict[str, Any] = self.jobs[lane.world][0][f"{kind}-{way}@{lane}"]
        return found

    def weights(self, lane: Lane, way: str) -> dict[str, np.ndarray]:
        with np.load(self.jobs[lane.world][1] / f"one-update-{way}@{lane}.npz") as stored:
            return dict(stored)


@pytest.fixture(scope="module")
def lanes(run_cases: Callable[..., tuple[dict[str, Any], Path]]) -> Lanes:
    return Lanes(run_cases)


@cache
def anchor(kind: str) -> Curve:
    return train(Spec.model_validate(training(kind, "none").on(Lane("cpu")).spec))


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative difference; where one is no number (a skipped step), neither is the other."""
    a, b = np.array(found, dtype=float), np.array(expected, dtype=float)
    np.testing.assert_array_equal(np.isfinite(a), np.isfinite(b))
    finite = np.isfinite(b)
    return float(np.max(np.abs(a - b)[finite] / np.abs(b)[finite]))


@pytest.mark.parametrize(("lane", "kind", "way"), FP32_RUNS, ids=label)
def test_losses_and_norms_equal_a_plain_loops(lane: Lane, kind: str, way: str, lanes: Lanes) -> None:
    found, expected = lanes.of(lane, kind, way), anchor(kind)
    assert difference(found["losses"], expected.losses) <= PLAIN_TOLERANCE
    assert difference(found["norms"], expected.norms) <= PLAIN_TOLERANCE


@pytest.mark.parametrize(("lane", "kind", "way"), RECOMPUTED, ids=label)
def test_the_same_lane_without_it_has_the_same_numbers(lane: Lane, kind: str, way: str, lanes: Lanes) -> None:
    found, expected = lanes.of(lane, kind, way), lanes.of(lane, kind, "none")
    assert difference(found["losses"], expected["losses"]) <= SAME_ARITHMETIC
    assert difference(found["norms"], expected["norms"]) <= SAME_ARITHMETIC
    assert found["skipped"] == expected["skipped"]
    assert found["loss_scales"] == expected["loss_scales"]


@pytest.mark.parametrize("way", ["groups", "ops"])
@pytest.mark.parametrize("lane", LANES, ids=label)
def test_one_update_gives_equal_parameters(lane: Lane, way: str, lanes: Lanes) -> None:
    found, expected = lanes.weights(lane, way), lanes.weights(lane, "none")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= SAME_ARITHMETIC * np.abs(value).max(), name


@pytest.mark.parametrize("lane", [BY_HAND[0], ALONE[-1]], ids=label)
def test_dropout_was_really_on(lane: Lane, lanes: Lanes) -> None:
    found, without = lanes.of(lane, "dropout", "groups"), lanes.of(lane, "short", "groups")
    assert abs(found["losses"][0] / without["losses"][0] - 1) > 1e-4


@pytest.mark.parametrize("lane", [BY_HAND[0], ALONE[-1]], ids=label)
def test_the_loss_scale_overflowed_and_came_down(lane: Lane, lanes: Lanes) -> None:
    assert {True, False} <= set(lanes.of(lane, "fp16", "ops")["skipped"])
