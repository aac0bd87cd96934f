"""`memory.optimizer_in_backward`: the same training to the bit, without a set of gradients."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tests.conformance.plain import train
from tests.conformance.worker import Collector
from tests.simulated.backend import simulated_backend
from tests.simulated.counting import MEMORY
from tests.techniques.test_pairs import BF16_WEIGHTS, described, merged
from tests.whole_state import whole_state
from xtrain import registry
from xtrain.contract import Backend, Job, OutOfMemory, StepInput, StepMemory
from xtrain.data import open_data
from xtrain.loop import Loop
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.schedule import learning_rate
from xtrain.spec.check import check_spec
from xtrain.spec.tree import Spec

AT_ONCE = {"memory": {"optimizer_in_backward": True}}
ADAMW = {"optimizer": {"name": "adamw", "lr": 5e-3}}
STEPS = 6
TOGETHER: list[list[dict[str, Any]]] = [
    [],
    [ADAMW],
    [{"precision": "bf16"}],
    [ADAMW, {"precision": BF16_WEIGHTS}],
    [{"memory": {"checkpointing": "auto"}}],
    [ADAMW, {"memory": {"checkpointing": {"every": 2}, "loss_chunk": 5}}],
    [{"memory": {"checkpointing": {"selective": {"ops": "cheap"}}}}],
    [ADAMW, {"memory": {"offload": {"optimizer": "cpu"}}}],
    [ADAMW, {"memory": {"offload": {"optimizer": "cpu"}}, "precision": BF16_WEIGHTS}],
    [{"memory": {"offload": {"activations": "cpu"}, "loss_chunk": "none"}}],
    [ADAMW, {"manual": {"devices": ["main", "cpu"], "split": [1, 2]}}],
]


def engine_of(backend: Backend, spec: Spec) -> Any:
    """Its own attributes are looked at here."""
    vocab_size = open_data(spec, show_progress=False).vocab_size
    return backend.start(backend.resolve(spec, 1), model_source(spec, vocab_size), Job())


def trained(backend: Backend, *changes: Any) -> tuple[list[Any], dict[Any, torch.Tensor]]:
    """Losses and norms, and the whole state at the end."""
    spec = merged(*changes)
    assert [*check_spec(spec), *backend.problems(spec, 1)] == []
    engine, data, collector = engine_of(backend, spec), open_data(spec, show_progress=False), Collector()
    Loop(engine, data, learning_rate(spec), collector, STEPS, audits=False).run(0, STEPS)
    state = {key: value.cpu().clone() for key, value in whole_state(engine).items()}
    engine.close()
    return [(record.loss, record.grad_norm) for record in collector.records], state


@pytest.mark.parametrize("device", ["cpu", "sim"])
@pytest.mark.parametrize("changes", TOGETHER, ids=described)
def test_losses_norms_weights_and_moments_are_those_of_an_update_after_it(device: str, changes: Any) -> None:
    with simulated_backend() as simulated:
        backend = simulated if device == "sim" else registry.load(device)
        found, state = trained(backend, *changes, AT_ONCE)
        expected, wanted = trained(backend, *changes)
    assert found == expected
    assert list(state) == list(wanted)
    assert [key for key in state if not torch.equal(state[key], wanted[key])] == []


def test_losses_and_norms_are_those_of_the_plain_loop() -> None:
    plain = train(merged({"train": {"steps": STEPS}}))
    found, _ = trained(registry.load("cpu"), AT_ONCE, {"train": {"steps": STEPS}})
    losses, norms = zip(*found, strict=True)
    assert losses == pytest.approx(plain.losses, rel=1e-6)
    assert norms == pytest.approx(plain.norms, rel=1e-6)


@pytest.mark.parametrize(("before", "after"), [(AT_ONCE, {}), ({}, AT_ONCE)], ids=["to after", "to within"])
def test_a_run_goes_on_from_the_state_of_the_other_kind(before: Any, after: Any) -> None:
    cpu = registry.load("cpu")
    first, second = engine_of(cpu, merged(ADAMW, before)), engine_of(cpu, merged(ADAMW, after))
    step(first, merged(ADAMW), 0)
    second.import_state(Stored(whole_state(first)))
    second.restore_extras(first.extras())
    for engine in (first, second):
        step(engine, merged(ADAMW), 1)
    states = [whole_state(engine) for engine in (first, second)]
    assert [key for key, value in states[0].items() if not torch.equal(value, states[1][key])] == []


class Stored:
    """Reads a state that was taken from an engine."""

    def __init__(self, state: Any) -> None:
        self.state = {key: value.clone() for key, value in state.items()}

    def read(self, name: str, kind: Any) -> torch.Tensor | None:
        return self.state.get((name, kind))


def step(engine: Any, spec: Spec, number: int) -> None:
    data = open_data(spec, show_progress=False)
    batches = data.micro_batches(number, 0, 1)
    engine.train_step(StepInput(number, batches, 1e-3, data.target_tokens(number)), None, NullTrace())


SMALL_PASSES = {
    "model": {"hidden": 64, "layers": 4},
    "memory": {"checkpointing": {"every": 1}, "loss_chunk": 5},
}
"""Where the training state is what fills the device."""


def counted(backend: Backend, *changes: Any) -> tuple[StepMemory, int]:
    """What the ledger saw in the second step, and the most that the device held in it."""
    gc.collect()
    spec = merged(ADAMW, SMALL_PASSES, *changes)
    engine, data = engine_of(backend, spec), open_data(spec, show_progress=False)
    step(engine, spec, 0)
    MEMORY[0].reset_peak()
    before = MEMORY[0].live_bytes - sum(engine.memory().categories.values())
    loop = Loop(engine, data, learning_rate(spec), Collector(), 7)
    loop.run(1, 4)
    engine.close()
    assert loop.step_memory is not None
    return loop.step_memory, MEMORY[0].peak_bytes - before


@pytest.mark.parametrize("precision", ["fp32", BF16_WEIGHTS], ids=str)
def test_no_set_of_gradients_is_ever_there(precision: Any) -> None:
    with simulated_backend() as simulated:
        within, peak_within = counted(simulated, AT_ONCE, {"precision": precision})
        after, peak_after = counted(simulated, {"precision": precision})
    sizes = [p.numel() for p in model_source(merged(SMALL_PASSES), 257).build().parameters()]
    assert after.peaks["sim:0"]["gradients"] >= 4 * sum(sizes)
    assert within.peaks["sim:0"]["gradients"] <= 8 * max(sizes) < 2 * sum(sizes)  # of one, in both widths
    assert peak_after - peak_within > 2 * sum(sizes)


def test_a_device_that_is_full_within_the_update_says_that_weights_may_be_half_updated() -> None:
    spec = merged(ADAMW, AT_ONCE)
    engine = engine_of(registry.load("cpu"), spec)

    def full(name: str) -> None:
        raise MemoryError

    engine.weights.publish_one = full
    with pytest.raises(OutOfMemory) as caught:
        step(engine, spec, 0)
    assert caught.value.moment == "update"


CLIPPED = {"train": {"clip": 1.0}}
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (CLIPPED, "train.clip null, not 1", "set train.clip: null"),
    ({"batch": {"micro": 1}}, "one pass per update, not 2", "set batch.micro: 2"),
    ({"stability": {}}, "no stability section", "leave stability out"),
    ({"precision": "fp16"}, "no fp16", "use precision: bf16"),
    (
        {"memory": {"offload": {"gradients": "cpu"}}},
        "offload.gradients none",
        "leave memory.offload.gradients",
    ),
]


@pytest.mark.parametrize(("changes", "expected", "nearest"), REFUSED, ids=str)
def test_what_comes_between_backward_and_update_is_refused_by_name(
    changes: dict[str, Any], expected: str, nearest: str
) -> None:
    (problem,) = check_spec(merged(AT_ONCE, changes))
    assert problem.path == "memory.optimizer_in_backward"
    assert expected in problem.expected
    assert problem.nearest.startswith(nearest)
    assert check_spec(merged(changes)) == []
