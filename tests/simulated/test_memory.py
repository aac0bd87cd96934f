"""Memory by category on a device that counts: the ledger's figures are the device's own."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.worker import Collector
from tests.simulated.backend import Simulated, _devices
from tests.simulated.counting import MEMORY
from tests.simulated.test_manual_engine import spec_of, start
from tests.simulated.test_placement import WAYS
from tests.simulated.test_placement import spec_of as placed
from tests.small_runs import checkpoints, run, steps, weights
from xtrain.contract import Backend, StepMemory
from xtrain.data import open_data
from xtrain.loop import Loop
from xtrain.record import load_record
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec

PRECISIONS = ["fp32", "bf16", {"dtype": "bf16", "weights": "bf16"}]


def audited(backend: Backend, spec: Spec) -> tuple[StepMemory, int]:
    """What the ledger counted in the second step, and the most that the device did."""
    gc.collect()
    engine, data = start(backend, spec), open_data(spec, show_progress=False)
    loop = Loop(engine, data, learning_rate(spec), Collector(), 7)
    before = MEMORY[0].live_bytes - sum(engine.memory().categories.values())  # type: ignore[union-attr]
    loop.run(0, 3)
    engine.close()
    assert loop.step_memory is not None
    return loop.step_memory, MEMORY[0].peak_bytes - before


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
def test_the_categories_add_up_to_the_device_s_own_count(simulated: Backend, precision: Any) -> None:
    memory, peak_bytes = audited(simulated, spec_of(precision=precision))
    total = sum(memory.peaks["sim:0"].values())
    assert memory.step == 2
    assert 0.98 * peak_bytes <= total <= peak_bytes  # what a composite kernel holds inside is not seen


@pytest.mark.parametrize("way", WAYS)
def test_they_do_so_with_every_way_of_placing_things(simulated: Backend, way: str) -> None:
    memory, peak_bytes = audited(simulated, placed(WAYS[way]))
    total = sum(memory.peaks["sim:0"].values())
    assert 0.97 * peak_bytes <= total <= peak_bytes


def test_what_is_elsewhere_is_counted_there(simulated: Backend) -> None:
    memory, _ = audited(simulated, placed(WAYS["all"]))
    device, host = memory.peaks["sim:0"], memory.peaks["cpu"]
    assert "optimizer" not in device
    assert host["optimizer"] > 2 * (device["parameters"] + host["parameters"]) - 1024
    assert host["gradients"] >= device["parameters"] + host["parameters"] > device.get("gradients", 0) * 4
    assert min(device["activations"], host["activations"]) > 0


def test_master_weights_and_their_halves_are_told_apart(simulated: Backend) -> None:
    fp32 = audited(simulated, spec_of())[0].peaks["sim:0"]
    mixed = audited(simulated, spec_of(precision=PRECISIONS[2]))[0].peaks["sim:0"]
    assert "master" not in fp32
    assert mixed["master"] == fp32["parameters"] == 2 * mixed["parameters"]
    assert mixed["optimizer"] == fp32["optimizer"] > 2 * fp32["parameters"]


def test_a_larger_micro_batch_costs_activations_and_nothing_that_stays(simulated: Backend) -> None:
    small, large = (
        audited(simulated, Spec.model_validate({**spec_of().model_dump(by_alias=True), "batch": batch}))[0]
        for batch in ({"global": 8, "micro": 2}, {"global": 8, "micro": 8})
    )
    few, many = small.peaks["sim:0"], large.peaks["sim:0"]
    assert many["activations"] + many.get("logits", 0) > 2 * (few["activations"] + few.get("logits", 0))
    for kept in ("parameters", "optimizer"):
        assert few[kept] == many[kept]


@pytest.fixture
def cpu_is_simulated(simulated: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--backend cpu` trains on the simulated device, so that whole runs can."""
    gc.collect()
    monkeypatch.setitem(_devices.DEVICES, "cpu", Simulated)


@pytest.mark.usefixtures("cpu_is_simulated")
def test_a_run_s_record_and_summary_have_the_categories(tmp_path: Path) -> None:
    result = run(tmp_path, "--out", tmp_path / "out", backend="cpu", train__steps=4)
    assert result.exit_code == 0, result.stderr
    (memory,) = load_record(tmp_path / "out").memory
    assert memory.step_peaks is not None
    assert memory.categories is not None
    assert memory.live is not None
    held = memory.step_peaks.peaks["sim:0"]
    assert held["parameters"] == memory.categories["parameters"]
    assert memory.live.method == "counter"
    assert "memory, a step on sim:0" in result.stdout
    assert "activations" in result.stdout


@pytest.mark.usefixtures("cpu_is_simulated")
@pytest.mark.parametrize("step", [1, 3])
def test_out_of_memory_in_a_step_leaves_the_last_checkpoint_and_says_what_to_try(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(tmp_path, "--out", out, "--stop-after", 4, backend="cpu").exit_code == 0
    before = weights(out, 4)
    limit_in_step(monkeypatch, step)
    result = run(tmp_path, "--resume", out, backend="cpu")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    message = result.stderr[result.stderr.index("error: ") :]
    assert "sim:0 is out of memory in the middle of a step." in message
    assert "activations" in message
    assert f"The last checkpoint, {out / 'checkpoints' / 'step-00000004'}, is intact." in message
    assert "Try batch.micro: 1 (the global batch and what is learned stay the same)" in message
    assert load_record(out).status == "failed"
    assert checkpoints(out) == [4]
    assert weights(out, 4) == before
    MEMORY[0].limit_bytes = None
    monkeypatch.undo()
    monkeypatch.setitem(_devices.DEVICES, "cpu", Simulated)
    assert run(tmp_path, "--resume", out, backend="cpu").exit_code == 0
    assert steps(out) == list(range(1, 13))


def limit_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The device has hardly any room left, from this process's step `number` on (1-based)."""
    taken, honest = itertools.count(1), Loop._step

    def step(loop: Loop, *args: Any) -> None:
        if next(taken) == number:
            MEMORY[0].limit_bytes = MEMORY[0].live_bytes + 10_000
        honest(loop, *args)

    monkeypatch.setattr(Loop, "_step", step)
