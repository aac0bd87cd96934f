"""What `xtrain plan SPEC` answers: the peak, the ladder of techniques, ZeRO's stages, what fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from xtrain.contract import JSON, MEMORY_CATEGORIES
from xtrain.errors import RequestError
from xtrain.models.presets import Dimensions, dimensions
from xtrain.plan.step import Categories, Height, Step
from xtrain.spec.tree import BatchSection, Checkpointing, MemorySection, Precision, Spec

STAGES = {
    "none": (),
    "optimizer": ("optimizer", "master"),
    "gradients": ("optimizer", "master", "gradients"),
    "parameters": ("optimizer", "master", "gradients", "parameters"),
}
"""memory.sharding: what it divides over the processes (Rajbhandari et al. 2020)."""
SENT = {"none": 2, "optimizer": 2, "gradients": 2, "parameters": 3}
"""Numbers sent per parameter, process and step (the same, section 7)."""


@dataclass(frozen=True)
class Rung:
    """One set of techniques and its peak."""

    name: str
    peak: Height
    fits: bool | None
    """None where no device memory was given."""


@dataclass(frozen=True)
class Plan:
    model: str
    parameters: int
    accumulation: int
    peak: Height
    rest: Categories
    rungs: Sequence[Rung]
    stages: Sequence[Rung]
    sent_bytes: dict[str, int]
    """Per process and step, by stage; 0 with one process."""
    largest_micro: int | None
    """Sequences; None where no device memory was given, 0 where not even one fits."""

    def as_json(self) -> dict[str, JSON]:
        return {
            "model": self.model,
            "parameters": self.parameters,
            "accumulation": self.accumulation,
            "peak_at": self.peak.name,
            "peak_bytes": _whole(self.peak.bytes),
            "rest_bytes": _whole(self.rest),
            "ladder": [_rung_json(rung) for rung in self.rungs],
            "sharding": [_rung_json(rung) for rung in self.stages],
            "sent_bytes": self.sent_bytes,
            "largest_micro": self.largest_micro,
        }


def make_plan(spec: Spec, world: int, device_bytes: float | None) -> Plan:
    """Raises RequestError for a model that is not built in."""
    if spec.model.preset is None:
        raise RequestError(
            f"xtrain plan: found model.{'factory' if spec.model.factory else 'hf'}, expected model.preset: "
            "only built-in models are planned so far; --formula estimates any size"
        )
    size = dimensions(spec)
    step = Step(spec, size, spec.accumulation(world))

    def fits(height: Height) -> bool | None:
        return None if device_bytes is None else height.total <= device_bytes

    rungs = [Rung(name, s.peak, fits(s.peak)) for name, s in _ladder(spec, size)]
    stages = [Rung(name, h, fits(h)) for name in STAGES for h in [_sharded(step, name, world)]]
    weights = step.parameters * step.widths.weight
    return Plan(
        f"{spec.model.preset}, {size.layers} layers x {size.hidden}, vocabulary {size.vocab_size:,}",
        step.parameters,
        step.accumulation,
        step.peak,
        step.at_rest(),
        rungs,
        stages,
        {name: SENT[name] * weights if world > 1 else 0 for name in STAGES},
        None if device_bytes is None else _largest_micro(spec, size, device_bytes),
    )


def _ladder(spec: Spec, size: Dimensions) -> Iterator[tuple[str, Step]]:
    """The documents' order (mixed precision, accumulation, checkpointing), each rung with those before it."""
    plain = {"precision": Precision(), "memory": MemorySection(), "batch": _micro(spec, None)}
    whole = spec.model_copy(update=plain)
    yield "plain fp32, the whole batch at once", Step(whole, size, 1)
    mixed = whole.model_copy(update={"precision": Precision.model_validate("bf16")})
    yield "+ bf16 autocast", Step(mixed, size, 1)
    small = mixed.model_copy(update={"batch": _micro(spec, 1)})
    yield "+ accumulation, micro-batch 1", Step(small, size, small.batch.global_)
    every = MemorySection(checkpointing=Checkpointing(auto=True))
    checkpointed = small.model_copy(update={"memory": every})
    yield "+ activation checkpointing", Step(checkpointed, size, small.batch.global_)
    halves = checkpointed.model_copy(update={"precision": Precision(dtype="bf16", weights="bf16")})
    yield "+ bf16 weights with fp32 masters", Step(halves, size, small.batch.global_)


def _micro(spec: Spec, micro: int | None) -> BatchSection:
    return spec.batch.model_copy(update={"micro": micro})


def _sharded(step: Step, stage: str, world: int) -> Height:
    """The step's highest point with what `stage` divides divided; no gathered blocks, no buckets."""
    divided = STAGES[stage]
    heights = [
        replace(
            height,
            bytes=Categories(
                {name: held // world if name in divided else held for name, held in height.bytes.items()}
            ),
        )
        for height in step.heights()
    ]
    return max(heights, key=lambda height: height.total)


def _largest_micro(spec: Spec, size: Dimensions, device_bytes: float) -> int:
    """Of the micro-batches that divide the global batch, the largest that fits."""
    batch = spec.batch.global_
    divisors = [micro for micro in range(1, batch + 1) if batch % micro == 0]
    fitting = [
        micro
        for micro in divisors
        if Step(spec.model_copy(update={"batch": _micro(spec, micro)}), size, batch // micro).peak.total
        <= device_bytes
    ]
    return max(fitting, default=0)


def _rung_json(rung: Rung) -> dict[str, JSON]:
    return {
        "name": rung.name,
        "peak_at": rung.peak.name,
        "peak_bytes": _whole(rung.peak.bytes),
        "total_bytes": int(rung.peak.total),
        "fits": rung.fits,
    }


def _whole(found: Categories) -> dict[str, JSON]:
    return {name: int(found[name]) for name in MEMORY_CATEGORIES}
