"""Looking inside a step: time and memory by phase, on one step in many.

Timing a phase needs the device to be waited for, which costs speed. So it is done together with
sampling memory, seldom, and such steps stay out of the speed figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter

from xtrain.contract import Phase

TRACE_EVERY_STEPS = 25
FIRST_TRACED_STEP = 5
"""0-based; past the steps in which allocators and caches settle."""

AUDITED_STEPS = 2
"""The first has no optimizer state yet, but is where most runs that do not fit end. A run of two updates
traces its second, so that only its first is audited."""

_NOTHING = nullcontext()


def is_traced(step: int, total_steps: int) -> bool:
    """Whether update `step` (0-based) of `total_steps` is traced; a run shorter than that traces its last."""
    first = min(FIRST_TRACED_STEP, total_steps - 1)
    return step >= first and (step - first) % TRACE_EVERY_STEPS == 0


def is_audited(step: int, total_steps: int) -> bool:
    """Whether update `step` (0-based) is taken under the ledger (ledger.py): before speed counts."""
    return step < AUDITED_STEPS and not is_traced(step, total_steps)


class NullTrace:
    """For the steps that are not traced: costs next to nothing."""

    timed = False
    seconds: Mapping[str, float] = {}
    peak_live_bytes: int | None = None

    def span(self, phase: Phase) -> AbstractContextManager[None]:
        return _NOTHING


class SampledTrace:
    """For one traced step: seconds by phase, and the most live bytes seen at the ends of phases.

    `synchronize` waits for the device; `sample` gives its live bytes, or None where it cannot tell.
    A span inside another takes its time from it: every moment belongs to the innermost.
    """

    timed = True

    def __init__(self, synchronize: Callable[[], None], sample: Callable[[], int | None]) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_live_bytes: int | None = None
        self._synchronize = synchronize
        self._sample = sample
        self._open: list[Phase] = []
        self._since = 0.0

    @contextmanager
    def span(self, phase: Phase) -> Iterator[None]:
        outermost = not self._open
        self._settle(sampled=outermost)
        self._open.append(phase)
        self._since = perf_counter()
        yield  # no `finally`: after an error the device may be in no state to be asked
        self._settle(sampled=outermost)
        self._open.pop()
        if not outermost:
            self._since = perf_counter()

    def _settle(self, sampled: bool) -> None:
        """What was begun comes to its end, at the cost of the innermost span; then memory is looked at."""
        self._synchronize()
        if self._open:
            phase, now = self._open[-1], perf_counter()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        if sampled and (live_bytes := self._sample()) is not None:
            self.peak_live_bytes = max(live_bytes, self.peak_live_bytes or 0)
