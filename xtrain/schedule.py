"""The learning rate as one function of k, the 0-based index of the update.

    warm-up, k < warmup:        peak * k / warmup          (the first update has 0, as Hugging Face does)
    after it, with p = (k - warmup) / (steps - warmup), at most 1:
      constant                  peak
      linear                    peak * (1 - p)
      cosine                    peak * (min_ratio + (1 - min_ratio) * (1 + cos(2 pi cycles p)) / 2)
      wsd                       peak for `stable` updates, then half a cosine wave down to
                                peak * min_ratio over `decay` updates, then that
      warmup-decay              DeepSpeed's WarmupDecayLR: peak * (1 - p), and a warm-up that is linear
                                or peak * log(k + 1) / log(warmup)

Beyond the last step every schedule stays at its last value. Engines are told the value at every step.
DeepSpeed's own schedulers run one update later: their value at update k is this one's at k - 1
(docs/schedules.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable

from xtrain.spec.tree import WSD, Constant, Cosine, Linear, Schedule, Spec, WarmupDecay


def learning_rate(spec: Spec) -> Callable[[int], float]:
    """The function k -> learning rate of the update with 0-based index k."""
    peak, steps, schedule = spec.optimizer.lr, spec.train.steps, spec.schedule
    return lambda k: peak * factor(schedule, k, steps)


def factor(schedule: Schedule, k: int, steps: int) -> float:
    """The share of the peak learning rate at update k of `steps`, in [0, 1]."""
    if k < schedule.warmup:
        return _warmup(schedule, k)
    progress = _share(k - schedule.warmup, steps - schedule.warmup)
    match schedule:
        case Constant():
            return 1.0
        case Linear() | WarmupDecay():
            return 1.0 - progress
        case Cosine():
            return _cosine(progress, schedule.min_ratio, schedule.cycles)
        case WSD():
            decayed = _share(k - schedule.warmup - schedule.stable, schedule.decay)
            return _cosine(decayed, schedule.min_ratio, cycles=0.5)


def _warmup(schedule: Schedule, k: int) -> float:
    if isinstance(schedule, WarmupDecay) and schedule.warmup_type == "log":
        return math.log(k + 1) / math.log(max(2, schedule.warmup))
    return k / schedule.warmup


def _share(done: int, length: int) -> float:
    """How much of a phase is over, in [0, 1]."""
    return min(1.0, max(0.0, done / max(1, length)))


def _cosine(progress: float, floor: float, cycles: float) -> float:
    wave = (1 + math.cos(2 * math.pi * cycles * progress)) / 2
    return floor + (1 - floor) * wave
