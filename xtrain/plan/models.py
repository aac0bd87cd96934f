"""What a micro-batch leaves in the model of a spec: counted for the built-in ones, traced for all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from xtrain.errors import RequestError
from xtrain.models.presets import Dimensions, dimensions, fitted_dimensions
from xtrain.plan import gpt2
from xtrain.plan.layout import HOST
from xtrain.plan.model import ModelBytes
from xtrain.spec.tree import Spec

Sized: TypeAlias = Callable[[Spec], ModelBytes]
"""Of a variation of the spec: another micro-batch, precision or set of techniques."""


@dataclass(frozen=True)
class PlannedModel:
    description: str
    bytes: Sized


def planned_model(spec: Spec, home: str) -> PlannedModel:
    """The model that a run of `spec` would have; `home` is where it computes.

    RequestError where only its data, or the model itself, could tell and cannot. Presets import no torch.
    """
    if spec.model.preset is None:
        from xtrain.plan.traced import Tracer

        tracer = Tracer.of(spec)
        return PlannedModel(tracer.description, tracer)
    size = planned_dimensions(spec)
    name = f"{spec.model.preset}, {size.layers} layers x {size.hidden}, vocabulary {size.vocab_size:,}"
    return PlannedModel(name, lambda changed: gpt2.spec_bytes(changed, size, home == HOST))


def planned_dimensions(spec: Spec) -> Dimensions:
    """Of a preset, with the vocabulary of its data where that decides."""
    if spec.model.preset != "gpt2-nano" or spec.model.vocab_size is not None:
        return dimensions(spec)
    from xtrain.data.vocabulary import data_vocabulary

    try:
        return fitted_dimensions(spec, data_vocabulary(spec))
    except RequestError as error:
        raise RequestError(f"{error}. To plan without the data, set model.vocab_size") from error
