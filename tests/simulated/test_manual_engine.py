"""The hand-written engine on the simulated device, through the code that `mps` takes."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from tests.conformance.cases import ADAMW, FP16, SGD_UNCLIPPED, Lane, Section, Training
from tests.conformance.plain import train
from tests.conformance.worker import Collector
from tests.simulated.counting import MEMORY, TRAFFIC
from xtrain import registry
from xtrain.contract import Backend, Engine, Job, ModelSource
from xtrain.data import open_data
from xtrain.loop import Loop
from xtrain.models.source import model_source
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec

STEPS = 20
MICRO_BATCHES = 4
SAME_ARITHMETIC = 1e-6


def spec_of(optimizer: Section = ADAMW, **changes: Any) -> Spec:
    training = Training("simulated", optimizer, steps=STEPS, accumulation=MICRO_BATCHES, **changes)
    return Spec.model_validate(training.on(Lane("cpu")).spec)


def start(backend: Backend, spec: Spec) -> Engine:
    data = open_data(spec, show_progress=False)
    return backend.start(backend.resolve(spec, 1), model_source(spec, data.vocab_size), Job())


def losses(backend: Backend, spec: Spec) -> list[float | None]:
    engine = start(backend, spec)
    collector = Collector()
    data = open_data(spec, show_progress=False)
    Loop(engine, data, learning_rate(spec), collector, 7, audits=False).run(0, STEPS)
    engine.close()
    return [record.loss for record in collector.records]


@pytest.mark.parametrize("optimizer", [ADAMW, SGD_UNCLIPPED], ids=["adamw", "sgd"])
def test_it_trains_to_the_losses_of_the_plain_loop(simulated: Backend, optimizer: Section) -> None:
    spec = spec_of(optimizer)
    assert losses(simulated, spec) == pytest.approx(train(spec).losses, rel=SAME_ARITHMETIC)


@pytest.mark.parametrize("precision", ["bf16", {"dtype": "bf16", "weights": "bf16"}, FP16], ids=str)
def test_mixed_precision_is_that_of_the_cpu(
    simulated: Backend, precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTRAIN_EMULATED_FP16", "1")
    spec = spec_of(precision=precision)
    expected = losses(registry.load("cpu"), spec)
    assert losses(simulated, spec) == pytest.approx(expected, rel=SAME_ARITHMETIC)
    assert expected != pytest.approx(train(spec).losses, rel=SAME_ARITHMETIC)  # it was not fp32


def test_dropout_draws_from_the_device_and_resumes_with_it(simulated: Backend) -> None:
    spec = spec_of(model={"preset": "gpt2-nano", "layers": 2, "hidden": 64, "heads": 2, "dropout": 0.2})
    engine = start(simulated, spec)
    state = engine.extras()
    first = torch.rand(4, device="sim")
    torch.rand(4)
    engine.restore_extras(state)
    assert torch.equal(torch.rand(4, device="sim").cpu(), first.cpu())


def test_a_closed_engine_leaves_no_byte_on_the_device(simulated: Backend) -> None:
    gc.collect()
    before = MEMORY[0].live_bytes
    losses(simulated, spec_of())
    gc.collect()
    assert MEMORY[0].live_bytes == before
    assert MEMORY[0].peak_bytes > before


def test_a_step_copies_its_tokens_and_waits_for_nothing(simulated: Backend) -> None:
    """Losses and norms stay on the device until they are fetched."""
    spec = spec_of()
    engine = start(simulated, spec)
    data = open_data(spec, show_progress=False)
    TRAFFIC.clear()
    collector = Collector()
    Loop(engine, data, learning_rate(spec), collector, 7)._step(0, *_untraced())
    tokens = 8 * 32 * 8  # sequences, tokens, bytes of an int64
    counted = {way: (copies.count, copies.bytes) for way, copies in TRAFFIC.copies.items()}
    assert counted == {("cpu", "sim:0"): (2 * MICRO_BATCHES, 2 * tokens)}
    assert TRAFFIC.numbers_read == 0
    engine.close()


def _untraced() -> Any:
    from xtrain.loop import Window
    from xtrain.measure.trace import NullTrace

    return Window(), NullTrace()


class Planted:
    """A model source whose model does something wrong in its forward."""

    description = "planted"

    def __init__(self, source: ModelSource, wrong: Any) -> None:
        self.source = source
        self.wrong = wrong

    def build(self) -> nn.Module:
        model = self.source.build()
        plain = model.forward
        model.forward = lambda tokens, targets: self.wrong(plain(tokens, targets))
        return model

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return self.source.decayed(name, parameter)


PLANTED = {
    "a CPU tensor": (lambda loss: loss * torch.ones(1), RuntimeError, "sim:0 and cpu"),
    "float64": (lambda loss: loss.double(), TypeError, "float64"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_an_accelerator_refuses_is_refused(simulated: Backend, name: str) -> None:
    wrong, error, message = PLANTED[name]
    spec = spec_of()
    data = open_data(spec, show_progress=False)
    source = Planted(model_source(spec, data.vocab_size), wrong)
    engine = simulated.start(simulated.resolve(spec, 1), source, Job())
    with pytest.raises(error, match=message):
        Loop(engine, data, learning_rate(spec), Collector(), 7).run(0, 1)
    engine.close()
