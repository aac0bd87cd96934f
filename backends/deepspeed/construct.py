"""The model as DeepSpeed is to have it: whole, or under stage 3 cut up while it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from xtrain.contract import ModelSource, PiecewiseSource


@dataclass(frozen=True)
class Built:
    """A model, and what of it cannot be seen any more once its parameters are cut up."""

    model: nn.Module
    decayed: frozenset[str]
    """Names of the parameters that weight decay applies to."""
    parameter_count: int


def build(source: ModelSource, ds_config: Mapping[str, Any], stage: int) -> Built:
    """Collective. Without a piecewise source every rank holds the whole until DeepSpeed cuts it up."""
    if stage == 3 and isinstance(source, PiecewiseSource):
        model = source.skeleton()
        facts = _facts(source, model)
        _fill_in_pieces(model, source, ds_config)
    else:
        model = source.build()
        facts = _facts(source, model)
    return Built(model, *facts)


def _facts(source: ModelSource, model: nn.Module) -> tuple[frozenset[str], int]:
    named = list(model.named_parameters())
    decayed = frozenset(name for name, parameter in named if source.decayed(name, parameter))
    return decayed, sum(parameter.numel() for _, parameter in named)


def _fill_in_pieces(model: nn.Module, source: PiecewiseSource, ds_config: Mapping[str, Any]) -> None:
    """Draw each parameter of a skeleton, and keep this rank's piece before the next is drawn.

    zero.Init as a context would do this too, but with weights that the modules' own constructors draw.
    """
    from deepspeed.runtime.zero import Init

    partitioner = Init(config_dict_or_path=dict(ds_config))
    for name, meta in list(model.named_parameters()):
        drawn = source.weight(name, tuple(meta.shape)).to(partitioner.dtype)
        parameter = nn.Parameter(drawn, requires_grad=meta.requires_grad)
        del drawn
        partitioner._convert_to_zero_parameters([parameter])
        _replace(model, meta, parameter)


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Wherever it stands: a tied parameter stands in several places."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module.register_parameter(name, new)


def bound_gathering(engine: Any) -> None:
    """Make `stage3_max_live_parameters` a bound on all that is gathered.

    DeepSpeed 0.19.8 looks at it before it prefetches one more parameter, which may then be beyond it, and
    does not count those that always stay. So its own figure is made smaller by both.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    private = "_PartitionedParameterCoordinator__max_n_available_params"
    kept = engine.optimizer.persistent_parameters
    stays = {p.ds_id for p in kept}
    fetched = [p.ds_numel for p in engine.module.parameters() if p.ds_id not in stays]
    room = getattr(coordinator, private) - sum(p.ds_numel for p in kept) - max(fetched, default=0)
    setattr(coordinator, private, max(room, 0))


def gathered_elements(model: nn.Module) -> int:
    """Elements of the parameters that are whole on this rank now, or about to be."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    away = ZeroParamStatus.NOT_AVAILABLE
    return sum(p.ds_numel for p in model.parameters() if p.ds_status != away)  # type: ignore[attr-defined]
