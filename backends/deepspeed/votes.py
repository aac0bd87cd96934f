"""One flag that all ranks agree on at every step, without making a step wait for it."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


class Votes:
    """The reduction of one call is waited for at the next: by then it is long done."""

    def __init__(self, world: int, timeout: timedelta) -> None:
        self._world = world
        self._group = dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None
        self._pending: tuple[dist.Work, torch.Tensor] | None = None

    def any(self, flag: bool) -> bool:
        """Whether any rank passed True at the call before this one (alone: at this one)."""
        if self._world == 1:
            return flag
        said = self._collect()
        ballot = torch.tensor([int(flag)])
        work = dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, ballot)
        return said

    def close(self) -> None:
        self._collect()

    def _collect(self) -> bool:
        if self._pending is None:
            return False
        work, ballot = self._pending
        self._pending = None
        work.wait()
        return bool(ballot.item())
