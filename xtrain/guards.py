"""Guards of a run's stability: whether a step that looks wrong is allowed to change the weights.

Asked between clipping and update with the loss and the norm of the whole global batch, so every rank
of every backend decides alike. A skipped step is counted and logged; its data is not seen again in
this epoch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from xtrain.contract import JSON, StepValues
from xtrain.errors import RunFailed
from xtrain.spec.tree import Precision, Spec, Stability

FLOOR_OVERFLOWS = 5
"""Overflows in a row, with the loss scale as low as it may go, that end a run."""


class Guards:
    """`accept` is the contract's: False skips the update."""

    def __init__(self, section: Stability) -> None:
        self._section = section
        self._losses: deque[float] = deque(maxlen=section.window)
        self.skips_in_a_row = 0
        self.last_reason = ""

    def accept(self, loss: float, norm: float | None) -> bool:
        """Take in one step. `norm` is None where the engine cannot know it: then it has no verdict."""
        reason = self._reason(loss, norm)
        if reason:
            self.skips_in_a_row += 1
            self.last_reason = reason
        else:
            self.skips_in_a_row = 0
            self._losses.append(loss)
        return not reason

    @property
    def exhausted(self) -> bool:
        """Whether `stop_after` steps in a row were skipped."""
        limit = self._section.stop_after
        return limit is not None and self.skips_in_a_row >= limit

    def check(self) -> None:
        """Raise RunFailed when exhausted."""
        if self.exhausted:
            raise RunFailed(
                f"{self.skips_in_a_row} steps in a row were skipped "
                f"(stability.stop_after is {self._section.stop_after}); "
                f"the last because {self.last_reason}. Lower optimizer.lr or lengthen schedule.warmup, and "
                "go on from a checkpoint before it began"
            )

    def state(self) -> dict[str, JSON]:
        return {"losses": list(self._losses), "skips_in_a_row": self.skips_in_a_row}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(float(loss) for loss in state["losses"])
        self.skips_in_a_row = int(state["skips_in_a_row"])

    def _reason(self, loss: float, norm: float | None) -> str:
        """Why this step must not count; empty when it may."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if norm is not None and not math.isfinite(norm):
            return f"the gradient norm is {norm}"
        limit = self._section.grad_norm
        if limit is not None and norm is not None and norm > limit:
            return f"the gradient norm {norm:.4g} is above stability.grad_norm {limit:g}"
        return self._spike(loss)

    def _spike(self, loss: float) -> str:
        times = self._section.loss_spike
        if times is None or len(self._losses) < self._section.window:
            return ""
        mean = sum(self._losses) / len(self._losses)
        if loss <= times * mean:
            return ""
        return (
            f"the loss {loss:.4g} is above {times:g} x {mean:.4g}, the mean of the last {len(self._losses)}"
        )


class Watch(Protocol):
    """Looks at every update once it is known, and ends a run that has no future."""

    def check(self, values: StepValues) -> None:
        """Take in one step; raises RunFailed."""
        ...


def watches(spec: Spec) -> list[Watch]:
    """Those that fit `spec`: with `stability` the user said what is to be done with a NaN."""
    if spec.precision.dtype == "fp16":
        return [OverflowWatch(spec.precision)]
    return [] if spec.stability else [DivergenceWatch()]


class DivergenceWatch:
    """Ends a run at its first loss that is no number: the weights it updates are ruined, or will be.

    It is seen when a logging window closes, before anything is saved.
    """

    def check(self, values: StepValues) -> None:
        if math.isfinite(values.loss):
            return
        raise RunFailed(
            f"the loss of step {values.step + 1} is {values.loss}: the training diverged, or its data or "
            "model is faulty. Lower optimizer.lr or lengthen schedule.warmup, and go on from a checkpoint "
            "before it began; or set stability: {} to have such steps skipped and counted"
        )


class OverflowWatch:
    """Ends a run whose loss scale cannot go lower and whose gradients still overflow."""

    def __init__(self, precision: Precision) -> None:
        self._floor = precision.min_loss_scale if precision.loss_scale == 0 else precision.loss_scale
        self._in_a_row = 0

    def check(self, values: StepValues) -> None:
        """Take in one step; raises RunFailed at the FLOOR_OVERFLOWS-th overflow in a row at the floor."""
        at_floor = values.loss_scale is not None and values.loss_scale <= self._floor
        # A guard skips a finite norm; that is not for the scale to answer.
        overflow = values.skipped and not (values.grad_norm is not None and math.isfinite(values.grad_norm))
        self._in_a_row = self._in_a_row + 1 if overflow and at_floor else 0
        if self._in_a_row >= FLOOR_OVERFLOWS:
            raise RunFailed(
                f"fp16 gradients overflowed in {self._in_a_row} steps in a row although the loss scale is at "
                f"its floor ({self._floor:g}): the training diverges, or the model needs more range than "
                "fp16 has. Use precision: bf16, or lower optimizer.lr"
            )
