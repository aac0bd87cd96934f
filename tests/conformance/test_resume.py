"""A training that was stopped and gone on with is the same training, wherever it goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.cases import FP16, SGD_UNCLIPPED, SHARDING, STEPS, Lane, Training
from tests.conformance.plain import train
from tests.jobs import run_job
from xtrain.models.source import model_source
from xtrain.plan.saves import background_copy_bytes
from xtrain.spec.tree import Spec

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Relative, in fp32, against the uninterrupted plain run."""

CPU = Lane("cpu")
ALONE = [CPU, *(Lane("deepspeed", sharding) for sharding in SHARDING)]
TOGETHER = [Lane("deepspeed", sharding, world=2) for sharding in SHARDING]
HOST = ("optimizer", "gradients")
OFFLOADED = [
    Lane("deepspeed", SHARDING[2], 1, HOST),
    Lane("deepspeed", SHARDING[3], 1, (*HOST, "parameters")),
    Lane("deepspeed", SHARDING[1], 2, HOST),
    Lane("deepspeed", SHARDING[3], 2, (*HOST, "parameters")),
]
LANES = ALONE + TOGETHER + OFFLOADED
MIDDLE = 9
"""Updates before the stop: not a multiple of the logging window, past the warm-up."""
ROUND = (7, 13, STEPS)
"""Updates at which one process hands over to two, these to one again, and that ends."""
WAY = ((CPU, 5), (TOGETHER[3], 10), (CPU, 15), (ALONE[2], STEPS))
"""Where a moving run goes, and up to which update: cpu, ZeRO-3 on two processes, cpu, ZeRO-1."""

ADAMW = Training("adamw")
SGD = Training("sgd", SGD_UNCLIPPED, clip=None)
FORGOTTEN = Training("moments-dropped")
MOVED_FP16 = Training("moved-fp16", precision={**FP16, "initial_scale_power": 8})
"""A scale that grows every three steps, and is too small to overflow by itself."""
OVERFLOW = {"gradient_factors": {"2": math.inf, "3": math.inf}}
"""Planted in the third and fourth update of a leg: the second one halves the scale."""
MIXED_TOLERANCE = 1e-3
"""Relative, in fp16 on another number of processes: products of other shapes round otherwise."""
SCALED = Training("fp16", precision=FP16)
SCALED_LANES = [CPU, *(Lane("deepspeed", s) for s in SHARDING[2:]), Lane("deepspeed", SHARDING[3], world=2)]

LOST = Training("lost", stability={"stop_after": 2})
NANS = {"gradient_factors": {"5": math.nan, "7": math.nan, "8": math.nan}}
FROZEN = Training("frozen", model={"factory": "tests.conformance.frozen_model:build"})
FROZEN_LANES = [CPU, Lane("deepspeed"), Lane("deepspeed", SHARDING[1]), *TOGETHER[2:]]

Results = dict[str, Any]


class Runs:
    """Every training in legs: one job of one process, one of two, and what is left here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        alone = [leg for lane in ALONE for training in (ADAMW, SGD) for leg in self.halves(training, lane)]
        alone += [
            leg for lane in OFFLOADED[:2] for training in (ADAMW, SGD) for leg in self.halves(training, lane)
        ]
        alone += self.halves(FORGOTTEN, CPU, drop_moments=True)
        alone += [leg for lane in SCALED_LANES if lane.world == 1 for leg in self.scaled(lane)]
        ways = [self.way(ADAMW), self.way(FORGOTTEN, drop_moments=True), self.way(MOVED_FP16, OVERFLOW)]
        rounds = [self.round(sharding) for sharding in SHARDING]
        alone += [legs[0] for legs in (*ways, *rounds)]
        whole = self.leg(MOVED_FP16, CPU, STEPS, "whole-fp16", "whole-fp16")
        planted = [str(start + place) for start in (0, 5, 10, 15) for place in (2, 3)]
        alone += [whole | {"gradient_factors": dict.fromkeys(planted, math.inf)}]
        alone += [self.leg(LOST, lane, STEPS, f"lost@{lane}", f"lost@{lane}") | NANS for lane in ALONE]
        alone += [self.leg(FROZEN, CPU, 2, str(lane), f"frozen-1@{lane}") for lane in FROZEN_LANES]
        alone += [self.other_seed(lane) for lane in FROZEN_LANES if lane.world == 1]
        together = [
            leg
            for lane in (*TOGETHER, *OFFLOADED[2:])
            for training in (ADAMW, SGD)
            for leg in self.halves(training, lane)
        ]
        together += [leg for lane in SCALED_LANES if lane.world == 2 for leg in self.scaled(lane)]
        together += [self.other_seed(lane) for lane in FROZEN_LANES if lane.world == 2]
        together += [legs[1] for legs in (*ways, *rounds)]
        again = [leg for legs in (*ways, *rounds) for leg in legs[2:]]
        self.results = self.start(alone, 1) | self.start(together, 2) | self.start(again, 1, "again")

    def leg(self, training: Training, lane: Lane, stop: int, place: str, name: str) -> dict[str, Any]:
        """One stretch of a training, in the folder `place`."""
        case = training.on(lane)
        folder = str(self.folder / place)
        return {"name": name, "backend": case.backend, "spec": case.spec, "folder": folder, "stop": stop}

    def halves(self, training: Training, lane: Lane, **extra: Any) -> list[dict[str, Any]]:
        place = f"{training.name}@{lane}"
        first = self.leg(training, lane, MIDDLE, place, f"{place}-1") | extra
        return [first, self.leg(training, lane, STEPS, place, f"{place}-2")]

    def other_seed(self, lane: Lane) -> dict[str, Any]:
        """Goes on where the engine's own initial weights would be others."""
        leg = self.leg(FROZEN, lane, 4, str(lane), f"frozen-2@{lane}")
        return leg | {"spec": {**leg["spec"], "train": {"steps": STEPS, "seed": 7}}}

    def way(
        self, training: Training, extra: Mapping[str, Any] | None = None, drop_moments: bool = False
    ) -> list[dict[str, Any]]:
        """One run that moves, saving in the background; its moments may be lost before the first move."""
        place = f"{training.name}@way"
        legs = [
            self.leg(training, lane, stop, place, f"{place}-{number}") | dict(extra or {})
            for number, (lane, stop) in enumerate(WAY)
        ]
        for leg in legs:
            leg["spec"] = {**leg["spec"], "checkpoint": {"background": True}}
            leg["audited"] = training is ADAMW
        return [legs[0] | {"drop_moments": drop_moments}, *legs[1:]]

    def round(self, sharding: str) -> list[dict[str, Any]]:
        """From one process to two and back, on one ZeRO stage."""
        place = f"round-{sharding}"
        return [
            self.leg(ADAMW, Lane("deepspeed", sharding, world), stop, place, f"{place}-{number}")
            for number, (world, stop) in enumerate(zip((1, 2, 1), ROUND, strict=True))
        ]

    def scaled(self, lane: Lane) -> list[dict[str, Any]]:
        whole = self.leg(SCALED, lane, STEPS, f"whole@{lane}", f"whole@{lane}")
        return [whole, *self.halves(SCALED, lane)]

    def start(self, plan: list[dict[str, Any]], world: int, name: str = "job") -> Results:
        """A fresh job of `world` processes."""
        out = self.folder / f"{name}-{world}"
        out.mkdir()
        (out / "plan.json").write_text(json.dumps(plan))
        run_job(world, "tests.conformance.resume_worker", out / "plan.json", out)
        results: Results = json.loads((out / "results.json").read_text())
        return results

    def joined(self, key: str, *names: str) -> list[Any]:
        """What the legs wrote, one after the other."""
        return [value for name in names for value in self.results[name][key]]

    def of(self, training: Training, lane: Lane, key: str = "losses") -> list[Any]:
        place = f"{training.name}@{lane}"
        return self.joined(key, f"{place}-1", f"{place}-2")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resume"))


@cache
def uninterrupted(name: str) -> list[float]:
    training = {"adamw": ADAMW, "sgd": SGD}[name]
    return train(Spec.model_validate(training.on(CPU).spec)).losses


def difference(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("lane", LANES, ids=str)
@pytest.mark.parametrize("training", [ADAMW, SGD], ids=lambda t: t.name)
def test_a_run_resumed_in_the_middle_equals_the_uninterrupted_plain_run(
    training: Training, lane: Lane, runs: Runs
) -> None:
    assert difference(runs.of(training, lane), uninterrupted(training.name)) <= TOLERANCE


@pytest.mark.parametrize("sharding", SHARDING)
def test_a_run_moves_from_one_process_to_two_and_back(
    sharding: str, runs: Runs, record_property: Callable[[str, object], None]
) -> None:
    found = difference(
        runs.joined("losses", *(f"round-{sharding}-{n}" for n in range(3))), uninterrupted("adamw")
    )
    record_property("largest relative difference of a loss", found)
    assert found <= TOLERANCE


def moved(runs: Runs, training: Training, key: str = "losses") -> list[Any]:
    return runs.joined(key, *(f"{training.name}@way-{number}" for number in range(len(WAY))))


def test_a_run_moves_to_zero_3_on_two_processes_back_and_to_zero_1(
    runs: Runs, record_property: Callable[[str, object], None]
) -> None:
    found = difference(moved(runs, ADAMW), uninterrupted("adamw"))
    record_property("largest relative difference of a loss", found)
    assert found <= TOLERANCE


def test_two_processes_keep_half_a_copy_each_for_a_save_in_the_background(runs: Runs) -> None:
    """As predicted, but for the padding of flat pieces."""
    (_, _), (lane, _), *_ = WAY
    section = {"checkpoint": {"background": True}}
    spec = Spec.model_validate({**ADAMW.on(lane).spec, **section})
    model = model_source(spec, 257).build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    predicted = background_copy_bytes(spec, parameters, lane.world)
    assert runs.results["adamw@way-1"]["copied_bytes"] == pytest.approx(predicted, rel=1e-2)


def test_a_run_that_moves_without_its_moments_is_told_apart(
    runs: Runs, record_property: Callable[[str, object], None]
) -> None:
    found = difference(moved(runs, FORGOTTEN), uninterrupted("adamw"))
    record_property("largest relative difference of a loss", found)
    assert found > 100 * TOLERANCE


def test_the_loss_scale_moves_with_the_run(
    runs: Runs, record_property: Callable[[str, object], None]
) -> None:
    """Overflows are planted in every leg; in between the scale grows, counted on from the leg before."""
    for key in ("loss_scales", "skipped"):
        assert moved(runs, MOVED_FP16, key) == runs.results["whole-fp16"][key]
    assert len(set(moved(runs, MOVED_FP16, "loss_scales"))) > 4
    found = difference(moved(runs, MOVED_FP16), runs.results["whole-fp16"]["losses"])
    record_property("largest relative difference of a loss", found)
    assert found <= MIXED_TOLERANCE


def test_a_resume_without_its_moments_is_told_apart(runs: Runs) -> None:
    found, expected = runs.of(FORGOTTEN, CPU), uninterrupted("adamw")
    assert found[: MIDDLE + 1] == runs.of(ADAMW, CPU)[: MIDDLE + 1]
    assert difference(found, expected) > 100 * TOLERANCE


@pytest.mark.parametrize("lane", SCALED_LANES, ids=str)
def test_the_loss_scale_is_carried(lane: Lane, runs: Runs) -> None:
    """Stopped between two overflows: window and hysteresis count on where they were."""
    for key in ("loss_scales", "skipped", "losses"):
        assert runs.of(SCALED, lane, key) == runs.results[f"whole@{lane}"][key]
    skipped = runs.of(SCALED, lane, "skipped")
    assert any(skipped[:MIDDLE])
    assert any(skipped[MIDDLE:])


@pytest.mark.parametrize("lane", ALONE, ids=str)
def test_nan_gradients_are_counted_by_the_guards_wherever_they_are_seen_first(lane: Lane, runs: Runs) -> None:
    """DeepSpeed skips them on its own at some stages, without asking."""
    found = runs.results[f"lost@{lane}"]
    assert found["skipped"] == [False] * 5 + [True, False, True, True]
    assert found["failure"].startswith("2 steps in a row were skipped (stability.stop_after is 2)")


def stored(folder: Path, step: int, family: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint's weights or moments, whoever wrote it."""
    from safetensors.torch import load_file

    files = sorted((folder / f"step-{step:08d}").glob(f"{family}-*.safetensors"))
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("lane", FROZEN_LANES, ids=str)
def test_frozen_parameters_and_buffers_come_from_the_checkpoint(lane: Lane, runs: Runs) -> None:
    folder = runs.folder / str(lane)
    before, after = (stored(folder, step, "model") for step in (2, 4))
    moments = stored(folder, 4, "optimizer")
    assert before.keys() == after.keys()
    frozen = [name for name in before if "frozen" in name or "scale" in name]
    assert len(frozen) == 3
    for name, value in before.items():
        assert torch.equal(after[name], value) == (name in frozen), name
    assert not [name for name in moments if "frozen" in name]
