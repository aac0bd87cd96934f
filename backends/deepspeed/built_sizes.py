"""Buckets and bounds where only the built model tells its sizes: `factory:` and `hf:`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from xtrain.contract import JSON, Resolved
from xtrain.errors import RequestError
from xtrain.models.blocks import find_blocks

from .zero import BLOCK, PERSISTENT, Pieces, pieces_of, sizes, stage_of

if TYPE_CHECKING:
    from torch import nn

    from xtrain.spec.tree import Spec

UNSIZED = (
    "ZeRO's buckets, and at stage 3 how much is gathered at once, are left at DeepSpeed's defaults: the "
    "model has no list of blocks to measure; name it in model.blocks"
)


def built_pieces(model: nn.Module, path: str | None) -> Pieces | None:
    """Of a model, cut up or not; None where its blocks cannot be found.

    RequestError where `path`, the spec's model.blocks, is not that of a list.
    """
    try:
        blocks = find_blocks(model, path, "memory.sharding")
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


def built_sizes(spec: Spec, model: nn.Module, world: int) -> dict[str, JSON] | None:
    """Keys of zero_optimization; none where nothing is to be added, None where nobody can tell them."""
    if stage_of(spec) == 0 or pieces_of(spec) is not None:
        return {}
    pieces = built_pieces(model, spec.model.blocks)
    if pieces is None:
        return None
    return {one.key.removeprefix(f"{BLOCK}."): one.value for one in sizes(spec, pieces, world)}


def sized(ds_config: Mapping[str, Any], found: Mapping[str, JSON]) -> dict[str, Any]:
    """With the sizes that were found, where the ds_config does not say otherwise."""
    return {**ds_config, BLOCK: {**found, **ds_config[BLOCK]}}


def completed(resolved: Resolved, found: Mapping[str, JSON]) -> Resolved:
    """With the ds_config as it is used."""
    config = sized(resolved.settings["ds_config"], found)  # type: ignore[arg-type]
    settings, files = {**resolved.settings, "ds_config": config}, {**resolved.files, "ds_config.json": config}
    return replace(resolved, settings=settings, files=files)


def _numbers(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _dimensions(parameter: nn.Parameter) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))
