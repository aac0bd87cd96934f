"""An engine's state as whole tensors on the host, put together from the pieces of all its ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist

from xtrain.contract import Engine, StateKey


def whole_state(engine: Engine) -> dict[StateKey, torch.Tensor]:
    """Collective where the engine has several ranks; the same on each."""
    own = [
        (p.name, p.kind, p.begin, p.value.to("cpu", copy=True)) for p in engine.export_state(lambda name: 0)
    ]
    by_rank = [own]
    if engine.data_size > 1:
        by_rank = [[] for _ in range(engine.data_size)]
        dist.all_gather_object(by_rank, own)
    layout = engine.state_layout()
    state = {key: torch.full(form.shape, 77).to(getattr(torch, form.dtype)) for key, form in layout.items()}
    for name, kind, begin, value in (piece for pieces in by_rank for piece in pieces):
        state[name, kind].view(-1)[begin : begin + value.numel()] = value.flatten()
    return state
