"""`xtrain doctor --grad-check`: does this backend compute the gradients that torch computes on the CPU?

One step of the user's own model, from the same weights on the same sequences, in fp32: once through a
backend's engine, once in bare torch on the host. The engine gives its gradients away through the
contract: after the first update of SGD with momentum the momentum *is* the gradient
(torch.optim.SGD: the buffer begins as a copy of it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtrain.choose import choose
from xtrain.contract import Batch, Engine, Job, ModelSource, OutOfMemory, StepInput
from xtrain.data import open_data
from xtrain.errors import RequestError, RunFailed
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.spec import load_spec
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3
"""Relative error that rounding does not reach: fp32 on another device differs by 1e-6 to 1e-4."""
SMALL = 1e-3
"""A gradient below this share of the average one is compared with that share instead: some gradients
are zero but for rounding (the bias of attention's keys, for one)."""

ONE_STEP = (
    "precision=fp32",
    "optimizer={name: sgd, lr: 1.0, momentum: 0.9}",
    "schedule={name: constant}",
    "train.steps=1",
    "train.clip=null",
    "train.eval_every=0",
    "stability=null",
    "log.trackers=[]",
    "launch.processes=1",
)
"""What is asked beside the user's own spec."""


@dataclass(frozen=True)
class ParameterCheck:
    """One parameter's gradient, on the backend against bare torch."""

    name: str
    norm: float
    """Of the gradient in bare torch."""
    error: float
    """Of the difference, relative; inf where the backend's is missing or not finite."""


@dataclass(frozen=True)
class GradCheck:
    """What one step showed."""

    backend: str
    reason: str
    model: str
    loss: float
    expected_loss: float
    parameters: Sequence[ParameterCheck]
    """The worst first."""
    tolerance: float

    @property
    def loss_error(self) -> float:
        difference = abs(self.loss - self.expected_loss) / abs(self.expected_loss)
        return difference if difference == difference else float("inf")

    @property
    def wrong(self) -> list[ParameterCheck]:
        return [one for one in self.parameters if one.error > self.tolerance]

    @property
    def right(self) -> bool:
        return not self.wrong and self.loss_error <= self.tolerance


def check_gradients(path: Path, overrides: Sequence[str], backend: str, tolerance: float) -> GradCheck:
    """Take the step twice and compare. One process, one micro-batch: `batch.global` becomes `batch.micro`.

    Raises RequestError where the spec, the data or the backend refuse, RunFailed where a device is full.
    """
    spec = load_spec(path, (*overrides, *_one_step(load_spec(path, overrides))))
    choice = choose(backend, spec, 1, str(path))
    data = open_data(spec, show_progress=True)
    source = model_source(spec, data.vocab_size)
    (batch,) = data.micro_batches(0, 0, 1)
    targets = data.target_tokens(0)
    # Bare torch first: an engine may change torch for the whole process.
    expected_loss, expected = gradients_in_bare_torch(source, batch, targets)
    try:
        engine = choice.backend.start(choice.backend.resolve(spec, 1), source, Job())
        with closing(engine):
            loss, found = gradients_of_engine(engine, batch, targets)
    except OutOfMemory as full:
        raise RunFailed(f"{full}; check with a smaller batch.micro or model") from full
    if not found:
        raise RequestError(f"--grad-check: backend {choice.backend.name} computes no gradients; use another")
    return GradCheck(
        choice.backend.name,
        choice.reason,
        source.description,
        loss,
        expected_loss,
        compare_gradients(expected, found),
        tolerance,
    )


def _one_step(spec: Spec) -> list[str]:
    dropout = ["model.dropout=0.0"] if spec.model.dropout else []
    return [*ONE_STEP, f"batch.global={spec.micro_batch}", f"batch.micro={spec.micro_batch}", *dropout]


def gradients_in_bare_torch(
    source: ModelSource, batch: Batch, target_tokens: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """(mean loss, gradient by parameter name) on the CPU in fp32."""
    import torch

    model = source.build()
    loss = model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)) / target_tokens
    loss.backward()
    return float(loss.detach()), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def gradients_of_engine(
    engine: Engine, batch: Batch, target_tokens: int
) -> tuple[float, dict[str, torch.Tensor]]:
    """The same through an engine, which takes one update of learning rate 0."""
    step = StepInput(step=0, micro_batches=[batch], lr=0.0, target_tokens=target_tokens)
    result = engine.train_step(step, None, NullTrace())
    (values,) = engine.fetch([result])
    gradients = {
        one.name: one.value.to("cpu", copy=True)  # it may be the engine's own memory
        for one in engine.export_state(lambda name: 0)
        if one.kind == "momentum"
    }
    return values.loss, gradients


def compare_gradients(
    expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> list[ParameterCheck]:
    """One row per parameter, the worst first."""
    norms = {name: float(gradient.norm()) for name, gradient in expected.items()}
    least = SMALL * sum(norms.values()) / len(norms)
    checks = [
        ParameterCheck(name, norms[name], _error(gradient, found.get(name), max(norms[name], least)))
        for name, gradient in expected.items()
    ]
    return sorted(checks, key=lambda one: -one.error)


def _error(expected: Any, found: Any, scale: float) -> float:
    if found is None:
        return float("inf")
    error = float((found.reshape(expected.shape) - expected).norm()) / scale if scale else 0.0
    return error if error == error else float("inf")
