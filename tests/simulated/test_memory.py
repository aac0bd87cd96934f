"""Memory by category on a device that counts: the ledger's figures are the device's own."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.conformance.worker import Collector
from tests.simulated.backend import Simulated, _devices
from tests.simulated.counting import MEMORY
from tests.simulated.test_manual_engine import spec_of, start
from tests.simulated.test_placement import WAYS, step
from tests.simulated.test_placement import spec_of as placed
from tests.small_runs import checkpoints, run, steps, weights
from xtrain.contract import Backend, OutOfMemory, StepMemory
from xtrain.data import open_data
from xtrain.loop import Loop
from xtrain.records.record import load_record
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


def limit_here() -> None:
    """From now on the device has hardly any room left."""
    MEMORY[0].limit_bytes = MEMORY[0].live_bytes + 10_000


def limit_before(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> None:
    """From that call of a method of Loop on (1-based)."""
    taken, honest = itertools.count(1), getattr(Loop, method)

    def limited(loop: Loop, *args: Any) -> Any:
        if next(taken) == call:
            limit_here()
        return honest(loop, *args)

    monkeypatch.setattr(Loop, method, limited)


def error_of(result: Result) -> str:
    """What a run that failed says, without what it said on the way."""
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    return result.stderr[result.stderr.index("error: ") :]


@pytest.fixture
def saved(tmp_path: Path, cpu_is_simulated: None) -> Iterator[Path]:
    """A run of 4 updates, which is as it was after the test and goes on when there is room again."""
    out = tmp_path / "out"
    assert run(tmp_path, "--out", out, "--stop-after", 4, **LONGER).exit_code == 0
    before = weights(out, 4)
    yield out
    assert checkpoints(out) == [4]
    assert weights(out, 4) == before
    MEMORY[0].limit_bytes = None
    gc.collect()
    with pytest.MonkeyPatch.context() as healed:
        healed.setattr(Loop, "_step", HONEST_STEP)
        healed.setattr(Loop, "_evaluate", HONEST_EVALUATION)
        assert run(tmp_path, "--resume", out, **LONGER).exit_code == 0
    assert steps(out) == list(range(1, 13))


LONGER: dict[str, Any] = {"backend": "cpu", "data__seq_len": 64}
"""Activations are a good part of what it holds."""
HONEST_STEP, HONEST_EVALUATION = Loop._step, Loop._evaluate


def says_the_checkpoint_is_intact(message: str, out: Path) -> bool:
    return f"The last checkpoint, {out / 'checkpoints' / 'step-00000004'}, is intact." in message


@pytest.mark.parametrize("step", [1, 3])
def test_out_of_memory_in_a_step_leaves_the_last_checkpoint_and_says_what_to_try(
    saved: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_before(monkeypatch, "_step", step)
    result = run(saved.parent, "--resume", saved, **LONGER)
    message = error_of(result)
    assert message.startswith("error: sim:0 is out of memory in the middle of a step.\n  sim:0 held ")
    assert "activations" in message
    assert says_the_checkpoint_is_intact(message, saved)
    assert "  batch.micro: 1 (the global batch and what is learned stay the same)" in message
    assert load_record(saved).status == "failed"


def test_the_summary_of_a_run_out_of_memory_says_so_in_a_line_and_the_error_says_the_rest(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_before(monkeypatch, "_step", 1)
    result = run(saved.parent, "--resume", saved, **LONGER)
    first, *others = result.stdout.splitlines()
    assert first.endswith(
        "failed after 4 steps on cpu, 1 process: sim:0 is out of memory in the middle of a step."
    )
    assert not [line for line in others if "out of memory" in line or "Try" in line]
    assert result.stderr.count("is out of memory") == 1


@pytest.mark.usefixtures("cpu_is_simulated")
def test_out_of_memory_while_weights_are_updated_is_told(tmp_path: Path) -> None:
    """The first update makes the two moments."""
    hook = register_optimizer_step_pre_hook(lambda *ignored: limit_here())
    try:
        message = error_of(run(tmp_path, "--out", tmp_path / "out", backend="cpu"))
    finally:
        hook.remove()
    assert message.startswith("error: sim:0 is out of memory while it updated the weights.\n  sim:0 held ")
    assert "There is no checkpoint yet." in message
    assert load_record(tmp_path / "out").status == "failed"


def test_out_of_memory_in_an_evaluation_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_before(monkeypatch, "_evaluate", 1)
    message = error_of(run(saved.parent, "--resume", saved, **LONGER, train__eval_every=3))
    assert message.startswith("error: sim:0 is out of memory in the middle of an evaluation.\n  sim:0 held ")
    assert "  batch.micro: 1 (" in message
    assert "checkpointing" not in message  # nothing is kept for a backward pass
    assert says_the_checkpoint_is_intact(message, saved)


def test_out_of_memory_while_a_checkpoint_is_read_is_told(saved: Path) -> None:
    """There is room for the weights, and not for the two moments."""
    parameter_bytes = load_record(saved).model.parameters * 4
    gc.collect()
    MEMORY[0].limit_bytes = MEMORY[0].live_bytes + 2 * parameter_bytes
    message = error_of(run(saved.parent, "--resume", saved, **LONGER))
    assert message.startswith(
        "error: sim:0 is out of memory before the first step, while the model was put in"
    )
    assert says_the_checkpoint_is_intact(message, saved)


@pytest.mark.usefixtures("cpu_is_simulated")
def test_a_model_that_does_not_fit_ends_a_run_before_it_leaves_anything(tmp_path: Path) -> None:
    limit_here()
    message = error_of(run(tmp_path, "--out", tmp_path / "out", backend="cpu"))
    assert message.splitlines()[0] == (
        "error: sim:0 is out of memory before the first step, while the model was put in its place."
    )
    assert message.splitlines()[1].startswith("  sim:0 held ")
    assert message.endswith("There is no checkpoint yet.\nTry:\n  a smaller model\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["start", "step"])
def test_the_device_that_is_full_is_the_one_that_is_named(simulated: Backend, moment: str) -> None:
    spec = placed({"manual": {"devices": ["main", "sim:1"], "split": [2, 2]}})
    gc.collect()
    if moment == "start":
        MEMORY[1].limit_bytes = MEMORY[1].live_bytes + 10_000

    def begin() -> None:
        engine = start(simulated, spec)
        MEMORY[1].limit_bytes = MEMORY[1].live_bytes + 10_000
        step(engine, spec)

    with pytest.raises(OutOfMemory) as caught:
        begin()
    assert (caught.value.device, caught.value.moment) == ("sim:1", moment)
    assert caught.value.memory.live is not None
    assert caught.value.memory.live.bytes <= (MEMORY[1].limit_bytes or 0)
