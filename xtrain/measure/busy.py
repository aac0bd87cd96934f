"""How busy a run keeps its machine: the device as its vendor tells, and the host by its cores' clocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from time import perf_counter, process_time
from typing import Protocol, runtime_checkable

from xtrain.records.record import RankBusy


@runtime_checkable
class Watchable(Protocol):
    """An engine whose device tells how busy it is."""

    def device_busy(self) -> float | None:
        """Local: share of the last moments in which the device had work, 0 to 1; None where nobody tells."""
        ...


@dataclass
class BusyMeter:
    """Of one process, from its making on."""

    engine: object
    _shares: list[float] = field(default_factory=list)
    _began: float = field(default_factory=perf_counter)
    _cpu_began: float = field(default_factory=process_time)

    def look(self) -> None:
        """At the device; for now and then, as it takes a moment."""
        if isinstance(self.engine, Watchable) and (share := self.engine.device_busy()) is not None:
            self._shares.append(share)

    def read(self) -> RankBusy:
        seconds = perf_counter() - self._began
        return RankBusy(
            device=fmean(self._shares) if self._shares else None,
            host_cores=(process_time() - self._cpu_began) / seconds if seconds > 0 else None,
        )
