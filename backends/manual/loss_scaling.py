"""Loss scaling for fp16 (Micikevicius et al. 2018), with DeepSpeed's rules and names.

fp16 loses gradients below 6e-8, so the loss is multiplied by a large power of two before the backward
pass and the gradients divided by it after. Too large, and something overflows: that step is skipped
and the scale comes down. The rules (deepspeed.runtime.fp16.loss_scaler, restated):

- an overflow first uses up `hysteresis`; with one left, it halves the scale, never below
  `min_loss_scale`; an overflow at that floor is fatal there, here after several in a row;
- `loss_scale_window` good steps since the last overflow (and every further window) double the scale
  and refill the hysteresis.

Plain Python numbers: torch's own scaler zeroed gradients on Apple GPUs (PyTorch #184286).
"""

from __future__ import annotations

from collections.abc import Mapping

from xtrain.contract import JSON
from xtrain.spec.tree import Precision

FACTOR = 2.0


class LossScaler:
    """`scale` is the one to use for the next backward pass; `update` is told how it went."""

    def __init__(self, precision: Precision) -> None:
        self.dynamic = precision.loss_scale == 0
        self.scale = 2.0**precision.initial_scale_power if self.dynamic else precision.loss_scale
        self.window = precision.loss_scale_window
        self.full_hysteresis = self.hysteresis = precision.hysteresis
        self.floor = precision.min_loss_scale
        self.steps = 0
        self.last_overflow = -1

    def update(self, overflow: bool) -> None:
        """Take in one step: whether any gradient was inf or NaN."""
        if self.dynamic:
            if overflow:
                self._after_overflow()
            else:
                self._after_good_step()
        self.steps += 1

    def state(self) -> dict[str, JSON]:
        return {
            "scale": self.scale,
            "hysteresis": self.hysteresis,
            "steps": self.steps,
            "last_overflow": self.last_overflow,
        }

    def restore(self, state: Mapping[str, float]) -> None:
        self.scale = float(state["scale"])
        self.hysteresis = int(state["hysteresis"])
        self.steps = int(state["steps"])
        self.last_overflow = int(state["last_overflow"])

    def _after_overflow(self) -> None:
        if self.hysteresis == 1:
            self.scale = max(self.scale / FACTOR, self.floor)
        else:
            self.hysteresis -= 1
        self.last_overflow = self.steps

    def _after_good_step(self) -> None:
        good_steps = self.steps - self.last_overflow - 1
        if good_steps > 0 and good_steps % self.window == 0:
            self.hysteresis = self.full_hysteresis
            self.scale *= FACTOR
