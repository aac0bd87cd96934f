"""Finds the blocks of a model: the layers of one kind that its loop runs through."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from xtrain.errors import RequestError
from xtrain.models.adapter import Adapter

LISTS = (nn.ModuleList, nn.Sequential)
LIST = "an nn.ModuleList or nn.Sequential"


def find_blocks(
    model: nn.Module, path: str | None, wanted_by: str = "memory.checkpointing"
) -> list[nn.Module]:
    """The blocks in order; `path` is the spec's `model.blocks`, as the model's own code names the list.

    Without it, the longest list of modules of one type that have parameters; a list inside another
    one (the experts of a layer) is no candidate. Raises RequestError, which names `model.blocks` and what
    the blocks are wanted by.
    """
    own = model.model if isinstance(model, Adapter) else model
    if path is not None:
        return _at(own, path)
    found = max(_outermost(own), key=len, default=None)
    if found is None:
        raise RequestError(
            f"{wanted_by}: the blocks of this model cannot be found: expected {LIST} of modules "
            f"of one type; name it in model.blocks, or do without {wanted_by}"
        )
    return found


def _at(model: nn.Module, path: str) -> list[nn.Module]:
    named = dict(model.named_modules())
    found = named.get(path)
    if isinstance(found, LISTS) and len(found):
        return list(found)
    lists = ", ".join(sorted(name for name, module in named.items() if isinstance(module, LISTS) and name))
    kind = f", a {type(found).__name__}" if found is not None else ""
    raise RequestError(
        f"model.blocks: found {path}{kind}, expected the path of {LIST}; this model has {lists or 'none'}"
    )


def _outermost(module: nn.Module) -> Iterator[list[nn.Module]]:
    for child in module.children():
        if isinstance(child, LISTS) and _is_uniform(list(child)):
            yield list(child)
        else:
            yield from _outermost(child)


def _is_uniform(modules: list[nn.Module]) -> bool:
    have_parameters = all(any(True for _ in module.parameters()) for module in modules)
    return have_parameters and len({type(module) for module in modules}) == 1
