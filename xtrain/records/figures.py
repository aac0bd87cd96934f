"""What record.json says of a run's steps, from one pass over them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from xtrain.measure.speed import SpeedMeter, SplitMeter
from xtrain.records.metrics import StepRecord
from xtrain.records.record import Evaluation, LossFacts, Totals


class StepFigures:
    """Takes the steps in order and keeps none of them, so that a long run's record needs no more memory.

    `speed` is of the steps after `start`, where this process began or resumed.
    """

    def __init__(self, records: Iterable[StepRecord], start: int, warmup_steps: int) -> None:
        self._start = start
        self._first: StepRecord | None = None
        self._last: StepRecord | None = None
        self._tokens = self._skipped = 0
        self._lowest_loss = math.inf
        self.evaluation: Evaluation | None = None
        self.speed = SpeedMeter(warmup_steps)
        self.time_split = SplitMeter()
        for record in records:
            self._add(record)

    def _add(self, record: StepRecord) -> None:
        self._first = self._first or record
        self._last = record
        self._tokens += record.tokens
        self._skipped += record.skipped
        if record.loss is not None:
            self._lowest_loss = min(self._lowest_loss, record.loss)
        if record.eval_loss is not None:
            self._evaluate(record.step, record.eval_loss)
        if record.step > self._start:
            self.speed.add(record)
        self.time_split.add(record)

    def _evaluate(self, step: int, loss: float) -> None:
        before = self.evaluation
        lowest, lowest_step = min((loss, step), (before.min, before.min_step) if before else (loss, step))
        self.evaluation = Evaluation(last=loss, last_step=step, min=lowest, min_step=lowest_step)

    def totals(self, seconds: float | None) -> Totals:
        last_step = self._last.step if self._last else 0
        return Totals(steps=last_step, tokens=self._tokens, skipped=self._skipped, seconds=seconds)

    def loss(self) -> LossFacts:
        if self._first is None or self._last is None:
            return LossFacts(first=None, last=None, min=None)
        lowest = self._lowest_loss if self._lowest_loss < math.inf else None
        return LossFacts(first=self._first.loss, last=self._last.loss, min=lowest)
