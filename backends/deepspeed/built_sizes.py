"""Stage 3's bounds on gathering where only the built model tells its sizes: `factory:` and `hf:`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xtrain.contract import JSON, Resolved
from xtrain.errors import RequestError
from xtrain.models.blocks import find_blocks

from .zero import BLOCK, PERSISTENT, Pieces, gathering_bounds, pieces_of, stage_of

if TYPE_CHECKING:
    from torch import nn

    from xtrain.spec.tree import Spec

UNBOUNDED = (
    "how much is gathered at once is left at DeepSpeed's defaults: the model has no list of blocks to "
    "measure; name it in model.blocks"
)


def built_pieces(model: nn.Module, path: str | None) -> Pieces | None:
    """Of a model, cut up or not; None where its blocks cannot be found.

    RequestError where `path`, the spec's model.blocks, is not that of a list.
    """
    try:
        blocks = find_blocks(model, path, "memory.sharding: parameters")
    except RequestError:
        if path is not None:
            raise
        return None
    parameters = list(model.parameters())
    numbers = [_numbers(parameter) for parameter in parameters]
    vector = max((n for p, n in zip(parameters, numbers, strict=True) if _dimensions(p) == 1), default=0)
    vector = min(vector, PERSISTENT)
    return Pieces(
        block=max(sum(map(_numbers, block.parameters())) for block in blocks),
        largest=max(numbers),
        vector=vector,
        vectors=sum(n for n in numbers if n <= vector),
        matrices=sum(_dimensions(p) > 1 for p in parameters),
    )


def bounds_of(spec: Spec, model: nn.Module) -> dict[str, JSON] | None:
    """Keys of zero_optimization; none where they are known already, None where they never will be."""
    if stage_of(spec) != 3 or pieces_of(spec) is not None:
        return {}
    pieces = built_pieces(model, spec.model.blocks)
    if pieces is None:
        return None
    return {one.key.removeprefix(f"{BLOCK}."): one.value for one in gathering_bounds(spec, pieces)}


def bounded(ds_config: Mapping[str, Any], bounds: Mapping[str, JSON]) -> dict[str, Any]:
    """With `bounds`, where the ds_config does not say otherwise."""
    return {**ds_config, BLOCK: {**bounds, **ds_config[BLOCK]}}


def completed(resolved: Resolved, bounds: Mapping[str, JSON]) -> Resolved:
    """With the ds_config as it is used."""
    config = bounded(resolved.settings["ds_config"], bounds)  # type: ignore[arg-type]
    settings, files = {**resolved.settings, "ds_config": config}, {**resolved.files, "ds_config.json": config}
    return replace(resolved, settings=settings, files=files)


def _numbers(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
