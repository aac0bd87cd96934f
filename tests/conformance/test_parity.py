"""The promise: the same training on every backend, sharding stage and world size.

All in fp32 unless a test says otherwise; 20 updates of a small GPT with accumulation 4, warm-up and
cosine. AdamW is nearly blind to a constant factor on the gradients, and so is SGD under a clip that
bites at every step; SGD without clipping is not. So all three are compared, norms too, and two
controls (learning rate 1% off, gradients doubled) must be told apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance.cases import (
    BF16,
    BITING_CLIP,
    CHUNKED,
    CONTROLS,
    EVALUATED,
    FORCED_OVERFLOWS,
    MOVING_SCALES,
    ONE_UPDATE,
    PLANTED_LOSS,
    PLANTED_NAN,
    PLANTED_SPIKE,
    SGD_UNCLIPPED,
    SHARDING,
    STEPS,
    TRAININGS,
    Case,
    Lane,
    Training,
)
from tests.conformance.plain import Curve, train
from xtrain import registry
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec

pytestmark = pytest.mark.slow

FP32_TOLERANCE = 1e-5
"""Relative; measured: losses 2.2e-7, norms 7e-7 at most, over all lanes."""

UPDATE_TOLERANCE = 5e-3
"""Of a parameter's largest change. Adam's first update is g / |g|: it blows up the rounding of a small g."""

MIXED_TOLERANCE = 1e-3
"""Relative, of losses in 16 bits. bf16 itself differs from fp32 by 3e-3."""

REFERENCE = Lane("cpu")
DEVICES = [
    Lane(name) for name, found in registry.survey().items() if name in ("cuda", "mps") and found.usable
]
BY_HAND = [REFERENCE, *DEVICES]
ZERO = [Lane("deepspeed", sharding) for sharding in SHARDING]
ALONE = [*BY_HAND, *ZERO]
TOGETHER = [Lane("deepspeed", sharding, world=2) for sharding in SHARDING]
LANES = ALONE + TOGETHER
JOBS = [*([BY_HAND, ZERO] if DEVICES else [ALONE]), TOGETHER]
"""Lanes that share a job. `-k cuda` starts one without DeepSpeed, which could fail or take the time."""
SKIPPED = [FORCED_OVERFLOWS, PLANTED_NAN, PLANTED_SPIKE, PLANTED_LOSS]
ACCUMULATIONS = [
    Training(f"accumulation-{n}", SGD_UNCLIPPED, clip=None, masked=0.3, accumulation=n) for n in (1, 2, 4)
]


def cases_on(lane: Lane) -> list[Case]:
    trainings = [*TRAININGS, *ACCUMULATIONS, *ONE_UPDATE, *SKIPPED, CHUNKED, EVALUATED]
    if lane in (REFERENCE, *DEVICES):
        trainings += BF16
    if lane in ALONE:
        trainings += MOVING_SCALES
    return [training.on(lane) for training in trainings]


class Lanes:
    """Every lane's results; a job is started once, when the first of its lanes is asked for."""

    def __init__(self, run: Callable[..., tuple[dict[str, Any], Path]]) -> None:
        self.run = run
        self.ended: dict[int, tuple[dict[str, Any], Path]] = {}

    def job(self, lane: Lane) -> tuple[dict[str, Any], Path]:
        """Results by name of the job that `lane` is in, and the folder of its weights."""
        number, others = next((number, lanes) for number, lanes in enumerate(JOBS) if lane in lanes)
        if number not in self.ended:
            cases = [case for other in others for case in cases_on(other)]
            if REFERENCE in others:
                cases += [control.on(REFERENCE) for control in CONTROLS]
            self.ended[number] = self.run(cases, lane.world)
        return self.ended[number]

    def of(self, training: Training, lane: Lane) -> dict[str, Any]:
        results, _ = self.job(lane)
        found: dict[str, Any] = results[f"{training.name}@{lane}"]
        return found

    def weights(self, training: Training, lane: Lane) -> dict[str, np.ndarray]:
        _, folder = self.job(lane)
        with np.load(folder / f"{training.name}@{lane}.npz") as stored:
            return dict(stored)


@pytest.fixture(scope="module")
def lanes(run_cases: Callable[..., tuple[dict[str, Any], Path]]) -> Lanes:
    return Lanes(run_cases)


@cache
def anchor(name: str) -> Curve:
    training = next(t for t in (*TRAININGS, *ACCUMULATIONS) if t.name == name)
    return train(Spec.model_validate(training.on(REFERENCE).spec))


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(expected) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("training", TRAININGS, ids=lambda t: t.name)
def test_losses_and_norms_equal_a_plain_loops(training: Training, lane: Lane, lanes: Lanes) -> None:
    found, expected = lanes.of(training, lane), anchor(training.name)
    assert difference(found["losses"], expected.losses) <= FP32_TOLERANCE
    assert difference(found["norms"], expected.norms) <= FP32_TOLERANCE


@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("training", ACCUMULATIONS, ids=lambda t: t.name)
def test_masked_targets_agree_whatever_the_accumulation(training: Training, lane: Lane, lanes: Lanes) -> None:
    """Micro-batches then have unequal numbers of targets: averaging their means would be wrong."""
    expected = anchor("accumulation-1")
    assert difference(lanes.of(training, lane)["losses"], expected.losses) <= FP32_TOLERANCE
    assert difference(lanes.of(training, lane)["norms"], expected.norms) <= FP32_TOLERANCE


@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("training", ONE_UPDATE, ids=lambda t: t.name)
def test_one_update_from_equal_states_gives_equal_parameters(
    training: Training, lane: Lane, lanes: Lanes
) -> None:
    """Parameter by parameter, so that twenty steps of chaos can neither hide nor fake a fault."""
    found, expected = lanes.weights(training, lane), lanes.weights(training, REFERENCE)
    before = initial_weights()
    assert found.keys() == expected.keys() == before.keys()
    for name, value in expected.items():
        compared = ~key_bias(name, value)
        update = (value - before[name])[compared]
        error = np.abs(found[name] - value)[compared].max()
        assert error <= UPDATE_TOLERANCE * np.abs(update).max(), name


@cache
def initial_weights() -> dict[str, np.ndarray]:
    model = model_source(Spec.model_validate(ONE_UPDATE[0].on(REFERENCE).spec), 257).build()
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def key_bias(name: str, value: np.ndarray) -> np.ndarray:
    """Where the bias of the attention keys stands: shifting all scores of a query changes no softmax, so its
    gradient is zero but for rounding, and Adam makes a whole step of a random sign out of it."""
    third = np.zeros(value.shape, dtype=bool)
    if name.endswith("query_key_value.bias"):
        third[len(value) // 3 : 2 * len(value) // 3] = True
    return third


@pytest.mark.parametrize("control", CONTROLS, ids=lambda t: t.name)
def test_controls_are_told_apart(control: Training, lanes: Lanes) -> None:
    found, expected = lanes.of(control, REFERENCE), anchor("sgd")
    assert difference(found["losses"], expected.losses) > 10 * FP32_TOLERANCE


def test_the_clip_bites_at_every_step() -> None:
    assert min(anchor("sgd-clipped").norms) > BITING_CLIP


def test_the_model_learns() -> None:
    losses = anchor("adamw").losses
    assert losses[-1] < losses[0] - 0.5


NO_DEVICE = pytest.param(None, marks=pytest.mark.skip(reason="needs an NVIDIA or an Apple GPU"))


@pytest.mark.parametrize("lane", DEVICES or [NO_DEVICE], ids=str)
@pytest.mark.parametrize("training", BF16, ids=lambda t: t.name)
def test_bf16_stays_in_its_band_on_another_device(training: Training, lane: Lane, lanes: Lanes) -> None:
    """DeepSpeed's 16 bits are in test_zero_matrix.py."""
    found, expected = lanes.of(training, lane), lanes.of(training, REFERENCE)
    assert difference(found["losses"], expected["losses"]) <= MIXED_TOLERANCE


@pytest.mark.parametrize("lane", ALONE, ids=str)
@pytest.mark.parametrize("training", MOVING_SCALES, ids=lambda t: t.name)
def test_the_loss_scale_grows_into_overflow_and_comes_back_at_the_same_steps(
    training: Training, lane: Lane, lanes: Lanes
) -> None:
    """On one process; on two each rank's own gradients must fit fp16, and those are not the global ones."""
    found, expected = lanes.of(training, lane), lanes.of(training, REFERENCE)
    assert found["skipped"] == expected["skipped"]
    assert found["loss_scales"] == expected["loss_scales"]
    assert 0 < sum(expected["skipped"]) < STEPS
    assert max(expected["loss_scales"][8:]) > min(expected["loss_scales"][:8])  # it grew again


@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("training", SKIPPED, ids=lambda t: t.name)
def test_what_goes_wrong_on_one_rank_is_skipped_at_the_same_steps_by_all(
    training: Training, lane: Lane, lanes: Lanes, record_property: Callable[[str, object], None]
) -> None:
    """A forced fp16 overflow, a NaN in one micro-batch, a spike of norm or loss: then all go on as if nothing
    had been."""
    found, expected = lanes.of(training, lane), lanes.of(training, REFERENCE)
    wrong = {**training.gradient_factors, **training.loss_factors}
    planted = [step in wrong for step in range(STEPS)]
    assert found["skipped"] == expected["skipped"] == planted
    assert found["loss_scales"] == expected["loss_scales"]
    tolerance = MIXED_TOLERANCE if training is FORCED_OVERFLOWS else FP32_TOLERANCE
    usual = [
        step for step in range(STEPS) if step not in training.loss_factors
    ]  # spikes differ with the world
    losses = [[run["losses"][step] for step in usual] for run in (found, expected)]
    error = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    record_property(f"largest relative difference of a loss, {training.name}", error)
    assert error <= tolerance


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_a_chunked_loss_is_the_same_training(lane: Lane, lanes: Lanes) -> None:
    found, expected = lanes.of(CHUNKED, lane), anchor("sgd")
    assert difference(found["losses"], expected.losses) <= FP32_TOLERANCE
    assert difference(found["norms"], expected.norms) <= FP32_TOLERANCE


@pytest.mark.parametrize("lane", LANES, ids=str)
def test_the_held_out_loss_is_the_same_number_everywhere(lane: Lane, lanes: Lanes) -> None:
    found, expected = lanes.of(EVALUATED, lane), lanes.of(EVALUATED, REFERENCE)
    evaluated = [i for i, loss in enumerate(expected["eval_losses"]) if loss is not None]
    assert evaluated == [4, 9, 14, 19]
    for step in evaluated:
        assert found["eval_losses"][step] == pytest.approx(expected["eval_losses"][step], rel=FP32_TOLERANCE)
