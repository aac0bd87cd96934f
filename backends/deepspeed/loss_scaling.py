"""DeepSpeed's loss scaler, with one fault of 0.19.8 mended and its state under our names.

DeepSpeed doubles the scale *before* it divides the step's gradients by it, so at every growth the update
is made from halved gradients (and stage 3 reports half the norm). Adam hides a constant factor, so
nobody sees it; SGD would. Here growth waits until the step is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xtrain.contract import JSON


class DeferredGrowth:
    """Takes hold of one engine's loss scaler."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        self._grown: float | None = None
        if scaler.dynamic:
            self._update_scale = scaler.update_scale
            scaler.update_scale = self._update
            scaler.raise_error_at_min_scale = False  # xtrain ends such a run itself, with a diagnosis

    @property
    def scale(self) -> float:
        """The one that the next backward pass uses."""
        return float(self._scaler.cur_scale)

    def after_step(self) -> None:
        if self._grown is not None:
            self._scaler.cur_scale, self._grown = self._grown, None

    def state(self) -> dict[str, JSON]:
        return {
            "scale": self.scale,
            "hysteresis": int(getattr(self._scaler, "cur_hysteresis", 1)),
            "steps": int(getattr(self._scaler, "cur_iter", 0)),
            "last_overflow": int(getattr(self._scaler, "last_overflow_iter", -1)),
        }

    def restore(self, stored: Mapping[str, Any]) -> None:
        self._scaler.cur_scale = float(stored["scale"])
        if self._scaler.dynamic:
            self._scaler.cur_hysteresis = int(stored["hysteresis"])
            self._scaler.cur_iter = int(stored["steps"])
            self._scaler.last_overflow_iter = int(stored["last_overflow"])

    def _update(self, overflow: bool) -> None:
        before = self._scaler.cur_scale
        self._update_scale(overflow)
        if not overflow and self._scaler.cur_scale != before:
            self._grown, self._scaler.cur_scale = self._scaler.cur_scale, before
