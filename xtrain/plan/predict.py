"""What a run says beforehand of its memory, to be held against what it measures. No model is built."""

from __future__ import annotations

from xtrain.contract import MEMORY_CATEGORIES, Engine
from xtrain.models.presets import fitted_dimensions
from xtrain.plan.layout import HOST, Planned, peaks
from xtrain.plan.saves import background_copy_bytes
from xtrain.plan.step import preset_step
from xtrain.records.record import Predicted
from xtrain.spec.tree import Spec


def predict(spec: Spec, world: int, backend: object, data_vocab_size: int, engine: Engine) -> Predicted:
    """Of one process of `backend`, whose engine stands: of a step, and of saves in the background."""
    kept = background_copy_bytes(spec, engine.parameter_count, world)
    step = _predict_step(spec, world, backend, data_vocab_size, engine)
    return step.model_copy(update={"save_copy_bytes": kept})


def _predict_step(spec: Spec, world: int, backend: object, data_vocab_size: int, engine: Engine) -> Predicted:
    """With a reason instead where it is not known."""
    if reason := _unknown(spec, backend):
        return Predicted(reason=reason)
    assert isinstance(backend, Planned)
    layout = backend.layout(spec, world, _device(engine))
    if layout is None:
        return Predicted(reason=f"backend {backend.name} decides what to put where once it has the model")
    step = preset_step(spec, spec.accumulation(world), fitted_dimensions(spec, data_vocab_size))
    found = peaks(step, layout)
    return Predicted(
        peak_bytes={
            place: {name: height.bytes[name] for name in MEMORY_CATEGORIES if height.bytes[name]}
            for place, height in found.items()
        },
        at={place: height.name for place, height in found.items()},
    )


def _device(engine: Engine) -> str:
    """Where the first parameters are: stem and head are where the engine computes."""
    first = next(iter(engine.holdings().get("parameters", ())), None)
    return HOST if first is None else str(first.device)


def _unknown(spec: Spec, backend: object) -> str | None:
    """Why nothing can be predicted; None where it can."""
    if not isinstance(backend, Planned):
        return f"backend {getattr(backend, 'name', '')} does not say how it lays out memory"
    if spec.model.preset is None:
        return "only a built-in model's memory is known without building it; `xtrain plan` does that"
    if spec.model.dropout > 0:
        return "with dropout what is kept depends on the kernels of the device"
    if spec.train.compile:
        return "compiled code fuses what the planner counts one by one"
    return None
