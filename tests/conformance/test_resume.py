"""A training that was stopped and gone on with is the same training, wherever it goes on."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.cases import FP16, SGD_UNCLIPPED, SHARDING, STEPS, Lane, Training
from tests.conformance.environment import ROOT, job_environment
from tests.conformance.plain import train
from tests.conformance.resume_worker import run_leg
from xtrain.contract import Job
from xtrain.spec.tree import Spec

pytestmark = pytest.mark.slow

TIMEOUT_SECONDS = 300
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
MOVES = (7, 13)
"""cpu up to the first, ZeRO-3 on two processes up to the second, cpu again."""

ADAMW = Training("adamw")
SGD = Training("sgd", SGD_UNCLIPPED, clip=None)
FORGOTTEN = Training("moments-dropped")
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
        alone += [self.leg(ADAMW, CPU, MOVES[0], "moved", "moved-1")]
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
        together += [self.leg(ADAMW, TOGETHER[3], MOVES[1], "moved", "moved-2")]
        last = self.leg(ADAMW, CPU, STEPS, "moved", "moved-3")
        self.results = self.start(alone, 1) | self.start(together, 2)
        self.results["moved-3"] = run_leg(last, Job())

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

    def scaled(self, lane: Lane) -> list[dict[str, Any]]:
        whole = self.leg(SCALED, lane, STEPS, f"whole@{lane}", f"whole@{lane}")
        return [whole, *self.halves(SCALED, lane)]

    def start(self, plan: list[dict[str, Any]], world: int) -> Results:
        """A fresh job of `world` processes."""
        out = self.folder / f"job-{world}"
        out.mkdir()
        (out / "plan.json").write_text(json.dumps(plan))
        module = ["-m", "tests.conformance.resume_worker", str(out / "plan.json"), str(out)]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        command = [sys.executable, *(launcher if world > 1 else []), *module]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=job_environment(world),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
        assert done.returncode == 0, done.stderr[-4000:]
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


def test_a_run_moves_from_the_cpu_to_zero_3_on_two_processes_and_back(runs: Runs) -> None:
    moved = runs.joined("losses", "moved-1", "moved-2", "moved-3")
    assert difference(moved, uninterrupted("adamw")) <= TOLERANCE


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
