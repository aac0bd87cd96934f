"""Layers over devices and offload to the CPU change no training.

On the CPU they have next to nothing to do: the numbers must then be exactly those of the lane without them.
That they also are where things really move is shown on the simulated device (tests/simulated), and here on
a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance.cases import FP16, SGD_UNCLIPPED, STEPS, Lane, Training
from tests.conformance.plain import Curve, train
from xtrain import registry
from xtrain.spec.tree import Spec

pytestmark = pytest.mark.slow

PLAIN_TOLERANCE = {"cpu": 1e-6, "cuda": 1e-5, "mps": 1e-5}
"""Relative; accumulation in four parts against the whole batch at once, and on a GPU its own arithmetic."""

LANE = Lane("cpu")
LANES = [Lane(name) for name, found in registry.survey().items() if name in PLAIN_TOLERANCE and found.usable]
MODEL = {"preset": "gpt2-nano", "layers": 4, "hidden": 64, "heads": 2}
OFFLOAD = {"optimizer": "cpu", "gradients": "cpu", "activations": "cpu"}
TWO = ["main", "cpu"]
WAYS: dict[str, dict[str, Any]] = {
    "none": {},
    "counts": {"manual": {"devices": TWO, "split": [1, 3]}},
    "fractions": {"manual": {"devices": ["cpu", "main", "cpu"], "split": [0.25, 0.5, 0.25]}},
    "auto": {"memory": {"sharding": "parameters"}},
    "offload": {"memory": {"offload": OFFLOAD}},
    "all": {
        "memory": {"offload": OFFLOAD, "checkpointing": {"every": 3}, "loss_chunk": 16},
        "manual": {"devices": TWO, "split": [2, 2]},
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": SGD_UNCLIPPED, "clip": None, "steps": STEPS},
    "adamw": {},
    "dropout": {"model": {**MODEL, "dropout": 0.1}},
    "bf16": {"precision": "bf16"},
    "bf16-weights": {"precision": {"dtype": "bf16", "weights": "bf16"}},
    "fp16": {"precision": FP16},
    "fp16-autocast": {"precision": {**FP16, "weights": "fp32"}},
}
IN_ALL_WAYS = [("sgd", way) for way in WAYS]
IN_ONE_WAY = [(kind, way) for kind in KINDS if kind != "sgd" for way in ("none", "all")]
RUNS = IN_ALL_WAYS + IN_ONE_WAY


def training(kind: str, way: str) -> Training:
    memory = {"loss_chunk": 16, **WAYS[way].get("memory", {})}
    fields = {"model": MODEL, "steps": 8, **KINDS[kind], "memory": memory, "manual": WAYS[way].get("manual")}
    return Training(f"{kind}-{way}", eval_every=4, keep_weights=True, **fields)


@pytest.fixture(scope="module")
def results(run_cases: Callable[..., tuple[dict[str, Any], Path]]) -> tuple[dict[str, Any], Path]:
    elsewhere = [training("sgd", way).on(lane) for lane in LANES if lane != LANE for way in WAYS]
    return run_cases([*(training(kind, way).on(LANE) for kind, way in RUNS), *elsewhere], 1)


@cache
def anchor() -> Curve:
    return train(Spec.model_validate(training("sgd", "none").on(LANE).spec))


@pytest.mark.parametrize(("kind", "way"), [run for run in RUNS if run[1] != "none"])
def test_all_numbers_are_those_of_the_lane_without_it(
    kind: str, way: str, results: tuple[dict[str, Any], Path]
) -> None:
    by_name, folder = results
    found, expected = by_name[f"{kind}-{way}@{LANE}"], by_name[f"{kind}-none@{LANE}"]
    assert repr(found) == repr(expected)  # the norm of a skipped step is NaN, which equals nothing
    weights, without = (np.load(folder / f"{kind}-{one}@{LANE}.npz") for one in (way, "none"))
    assert set(weights) == set(without)
    for name in weights:
        np.testing.assert_array_equal(weights[name], without[name], err_msg=name)


@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_losses_and_norms_equal_a_plain_loops(
    way: str, lane: Lane, results: tuple[dict[str, Any], Path]
) -> None:
    found, tolerance = results[0][f"sgd-{way}@{lane}"], PLAIN_TOLERANCE[lane.backend]
    np.testing.assert_allclose(found["losses"], anchor().losses, rtol=tolerance)
    np.testing.assert_allclose(found["norms"], anchor().norms, rtol=tolerance)
