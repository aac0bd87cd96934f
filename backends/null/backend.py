"""The backend that trains nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from xtrain.contract import (
    IGNORED_TARGET,
    JSON,
    Accept,
    Availability,
    Batch,
    Holdings,
    Job,
    LossSum,
    Memory,
    ModelSource,
    Problem,
    Resolved,
    StateForm,
    StateKey,
    StatePiece,
    StateReader,
    StepInput,
    StepResult,
    StepValues,
    Trace,
)

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

FIRST_LOSS = math.log(257)
"""What a model that knows nothing loses per byte."""
HALF_LIFE_STEPS = 20


class NullBackend:
    name = "null"

    def probe(self) -> Availability:
        return Availability(True, "scripted losses; trains nothing")

    def facts(self) -> Mapping[str, JSON]:
        return {}

    def problems(self, spec: Spec, world: int) -> list[Problem]:
        if world == 1:
            return []
        return [
            Problem("launch.processes", str(world), "backend null is always one process", "use --nproc 1")
        ]

    def resolve(self, spec: Spec, world: int) -> Resolved:
        return Resolved(self.name, spec, world, notes=["no model is trained: the losses are a formula"])

    def start(self, resolved: Resolved, model: ModelSource, job: Job) -> NullEngine:
        return NullEngine()


class NullEngine:
    """Every spec is accepted and none is honoured: loss and norm are functions of the step alone."""

    data_rank = 0
    data_size = 1
    asynchronous = False
    parameter_count = 0
    threads: int | None = None
    matmul_precision: str | None = None
    notes: Sequence[str] = ()

    def train_step(self, step: StepInput, accept: Accept | None, trace: Trace) -> StepResult:
        with trace.span("forward"):
            loss = scripted_loss(step.step)
        norm = loss / FIRST_LOSS
        accepted = accept is None or accept(loss, norm)
        return StepResult(step.step, step.target_tokens, loss * step.target_tokens, norm, not accepted)

    def evaluate(self, batches: Sequence[Batch]) -> LossSum:
        tokens = sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches)
        return LossSum(FIRST_LOSS * tokens, tokens)

    def fetch(self, results: Sequence[StepResult]) -> list[StepValues]:
        return [
            StepValues(
                r.step, float(r.loss_sum) / r.target_tokens, _float(r.grad_norm), bool(r.skipped), None
            )
            for r in results
        ]

    def memory(self) -> Memory:
        return Memory(live=None, reserved=None, categories=None)

    def holdings(self) -> Holdings:
        return {}

    def state_layout(self) -> Mapping[StateKey, StateForm]:
        return {}

    def export_state(self, owner: Callable[[str], int]) -> Iterator[StatePiece]:
        return iter(())

    def import_state(self, reader: StateReader) -> None:
        pass

    def extras(self) -> dict[str, JSON]:
        return {}

    def restore_extras(self, extras: Mapping[str, JSON]) -> None:
        pass

    def gather(self, value: JSON) -> list[JSON]:
        return [value]

    def any(self, flag: bool) -> bool:
        return flag

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


def scripted_loss(step: int) -> float:
    return FIRST_LOSS * (0.25 + 0.75 * math.exp2(-step / HALF_LIFE_STEPS))


def _float(value: object) -> float | None:
    return None if value is None else float(value)  # type: ignore[arg-type]
