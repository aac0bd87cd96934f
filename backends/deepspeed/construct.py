"""The model as DeepSpeed is to have it: whole, or under stage 3 cut up while it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xtrain.contract import GradualSource, Job, ModelSource, PiecewiseSource

from .cutting import CannotCut, Cutter

Value = Callable[[str, nn.Parameter], torch.Tensor]
"""The initial value of a parameter, on the CPU in fp32; collective."""


@dataclass(frozen=True)
class Built:
    """A model, and what of it cannot be seen any more once its parameters are cut up."""

    model: nn.Module
    decayed: frozenset[str]
    """Names of the parameters that weight decay applies to."""
    parameter_count: int
    notes: Sequence[str] = ()


def build(source: ModelSource, ds_config: Mapping[str, Any], stage: int, job: Job) -> Built:
    """Collective. Under stage 3 a rank holds its pieces and about one parameter, or a note says why not."""
    if stage != 3:
        model = source.build()
        return Built(model, *_facts(source, model))
    if isinstance(source, PiecewiseSource):
        model = source.skeleton()
        facts = _facts(source, model)
        pieces = source
        _partition(model, lambda name, meta: pieces.weight(name, tuple(meta.shape)), ds_config)
        return Built(model, *facts)
    with _host_group(job) as group:
        model, value, notes = _build_cut_up(source, job, group)
        facts = _facts(source, model)
        _partition(model, value, ds_config)
    return Built(model, *facts, notes)


def _build_cut_up(
    source: ModelSource, job: Job, group: dist.ProcessGroup | None
) -> tuple[nn.Module, Value, Sequence[str]]:
    """The model by its own code, each parameter's value, and what is to be said of it."""
    if job.world > 1:
        cutter = Cutter(job.rank, job.world, group)
        try:
            with cutter.building():
                model = source.build_gradually() if isinstance(source, GradualSource) else source.build()
            return model, lambda name, cut: cutter.whole(cut), ()
        except CannotCut as why:
            notes = [f"each process builds the whole model before it is cut up: {why}"]
    else:
        notes = []  # one process has all of it anyway
    return source.build(), lambda name, whole: whole.data, notes


@contextmanager
def _host_group(job: Job) -> Iterator[dist.ProcessGroup | None]:
    """For tensors in the host's memory, whatever the devices talk through."""
    if job.world == 1:
        yield None
        return
    group = dist.new_group(backend="gloo")
    yield group
    dist.destroy_process_group(group)


def _facts(source: ModelSource, model: nn.Module) -> tuple[frozenset[str], int]:
    named = list(model.named_parameters())
    decayed = frozenset(name for name, parameter in named if source.decayed(name, parameter))
    return decayed, sum(parameter.numel() for _, parameter in named)


def _partition(model: nn.Module, value: Value, ds_config: Mapping[str, Any]) -> None:
    """Make each parameter DeepSpeed's, and keep this rank's piece before the next is looked at.

    zero.Init as a context would do this too, but on the GPU, and a model's code that draws weights after
    a module was made, or computes with them, would find empty tensors.
    """
    from deepspeed.runtime.zero import Init

    partitioner = Init(config_dict_or_path=dict(ds_config))
    for name in [name for name, _ in model.named_parameters()]:
        old = model.get_parameter(name)
        parameter = nn.Parameter(value(name, old).to(partitioner.dtype), requires_grad=old.requires_grad)
        partitioner._convert_to_zero_parameters([parameter])
        _replace(model, old, parameter)
    for buffer in model.buffers():  # DeepSpeed leaves a model that is cut up where it is
        buffer.data = buffer.data.to(partitioner.local_device)


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
