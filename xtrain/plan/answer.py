"""What `xtrain plan SPEC` answers: the peak, the ladder of techniques, ZeRO's stages, what fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xtrain.contract import JSON, MEMORY_CATEGORIES
from xtrain.plan.ladder import Rung, Subject, ladder, largest_micro, possible, stages
from xtrain.spec.tree import STAGES

NO_SLACK = (
    "what an allocator reserves beyond its live tensors depends on the order and sizes of everything that is "
    "allocated and freed, kernels' workspace included; a run measures it: reserved less live"
)
"""Why the allocator's slack is not predicted (docs/decisions.md)."""


@dataclass(frozen=True)
class Plan:
    model: str
    parameters: int
    accumulation: int
    own: Rung
    """Of the spec as it is."""
    rest: Mapping[str, int]
    """Of its home between steps, by category."""
    rungs: Sequence[Rung]
    stages: Sequence[Rung]
    """Empty with one process."""
    auto: Sequence[Rung]
    """What `memory: auto` would try, in that order; empty without it."""
    largest_micro: int | None
    """Sequences; None where no device memory was given, 0 where not even one fits."""
    notes: Sequence[str]

    def as_json(self) -> dict[str, JSON]:
        own = self.own
        return {
            "model": self.model,
            "parameters": self.parameters,
            "accumulation": self.accumulation,
            "peak_at": own.peak.name,
            "peak_bytes": _whole(own.peak.bytes),
            "places": {place: _whole(height.bytes) for place, height in own.places.items()},
            "rest_bytes": _whole(self.rest),
            "fits": own.fits,
            "ladder": _rungs_json(self.rungs),
            "sharding": _rungs_json(self.stages),
            "memory_auto": _rungs_json(self.auto),
            "sent_bytes": {
                **dict.fromkeys(STAGES, 0),
                **{rung.name: rung.sent_bytes for rung in self.stages},
            },
            "largest_micro": self.largest_micro,
            "allocator_slack_bytes": None,
            "allocator_slack_reason": NO_SLACK,
            "notes": list(self.notes),
        }


def make_plan(subject: Subject, model: str, auto: Sequence[Rung] = (), notes: Sequence[str] = ()) -> Plan:
    """Raises RequestError where the spec itself cannot be laid out."""
    spec, step = subject.spec, subject.step(subject.spec)
    own = subject.layout(spec)
    return Plan(
        model,
        step.model.parameters,
        step.accumulation,
        subject.rung("", spec),
        own.held(step, step.rest())[own.home],
        list(possible(subject, ladder(spec, subject.world))),
        list(possible(subject, stages(spec))) if subject.world > 1 else [],
        auto,
        None if subject.device_bytes is None else largest_micro(subject),
        notes,
    )


def first_fit(rungs: Sequence[Rung]) -> Rung | None:
    """None where none fits, or no device memory was given."""
    return next((rung for rung in rungs if rung.fits), None)


def _rungs_json(rungs: Sequence[Rung]) -> list[JSON]:
    first = first_fit(rungs)
    return [
        {
            "name": rung.name,
            "peak_at": rung.peak.name,
            "peak_bytes": _whole(rung.peak.bytes),
            "total_bytes": int(rung.peak.total),
            "places": {place: int(height.total) for place, height in rung.places.items()},
            "fits": rung.fits,
            "first_fit": rung is first,
            "sent_bytes": rung.sent_bytes,
        }
        for rung in rungs
    ]


def _whole(found: Mapping[str, int]) -> dict[str, JSON]:
    return {name: int(found.get(name, 0)) for name in MEMORY_CATEGORIES}
