"""What a run says beforehand of its memory, to be held against what it measures. No weights are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xtrain.contract import MEMORY_CATEGORIES, Engine
from xtrain.errors import RequestError
from xtrain.models.presets import fitted_dimensions
from xtrain.plan import gpt2
from xtrain.plan.layout import HOST, Planned, peaks
from xtrain.plan.model import ModelBytes
from xtrain.plan.saves import background_copy_bytes
from xtrain.plan.step import Step
from xtrain.records.record import Predicted
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    from torch import nn


def predict(
    spec: Spec,
    world: int,
    backend: object,
    data_vocab_size: int,
    engine: Engine,
    outline: nn.Module | str | None = None,
) -> Predicted:
    """Of one process of `backend`, whose engine stands: of a step, and of saves in the background.

    `outline` is that of a model that is not built in (xtrain/models/outline.py).
    """
    kept = background_copy_bytes(spec, engine.parameter_count, world)
    step = _predict_step(spec, world, backend, data_vocab_size, engine, outline)
    return step.model_copy(update={"save_copy_bytes": kept})


def _predict_step(
    spec: Spec,
    world: int,
    backend: object,
    data_vocab_size: int,
    engine: Engine,
    outline: nn.Module | str | None,
) -> Predicted:
    """With a reason instead where it is not known."""
    if reason := _unknown(spec, backend):
        return Predicted(reason=reason)
    assert isinstance(backend, Planned)
    layout = backend.layout(spec, world, _device(engine))
    if layout is None:
        return Predicted(reason=f"backend {backend.name} decides what to put where once it has the model")
    try:
        model = _model(spec, data_vocab_size, layout.home == HOST, outline)
    except RequestError as error:
        return Predicted(reason=str(error))
    found = peaks(Step(spec, model, spec.accumulation(world)), layout)
    return Predicted(
        peak_bytes={
            place: {name: height.bytes[name] for name in MEMORY_CATEGORIES if height.bytes[name]}
            for place, height in found.items()
        },
        at={place: height.name for place, height in found.items()},
    )


def _model(spec: Spec, data_vocab_size: int, on_host: bool, outline: nn.Module | str | None) -> ModelBytes:
    if spec.model.preset is not None:
        return gpt2.spec_bytes(spec, fitted_dimensions(spec, data_vocab_size), on_host)
    if outline is None or isinstance(outline, str):
        raise RequestError(outline or "the model was not built here")
    from xtrain.plan.traced import Tracer

    return Tracer(spec, outline)(spec)


def _device(engine: Engine) -> str:
    """Where the first parameters are: stem and head are where the engine computes."""
    first = next(iter(engine.holdings().get("parameters", ())), None)
    return HOST if first is None else str(first.device)


def _unknown(spec: Spec, backend: object) -> str | None:
    """Why nothing can be predicted; None where it can."""
    if not isinstance(backend, Planned):
        return f"backend {getattr(backend, 'name', '')} does not say how it lays out memory"
    if spec.train.compile:
        return "compiled code fuses what the planner counts one by one"
    return None
