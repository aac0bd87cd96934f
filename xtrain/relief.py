"""A device is full: what filled it, and the next thing to try, cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from xtrain.checkpoints.format import complete_checkpoints
from xtrain.contract import ByPlace, OutOfMemory, StepMemory
from xtrain.spec import dump_spec
from xtrain.spec.tree import MemorySection, Spec
from xtrain.summary import format_bytes, format_categories

Refuses = Callable[[Spec], bool]
"""Whether the backend cannot honour a spec."""


def describe_out_of_memory(
    full: OutOfMemory, seen: StepMemory | None, spec: Spec, refuses: Refuses, checkpoints: Path | None
) -> str:
    """The message that a run ends with; `seen` is a step that was counted, this one or one before."""
    when = "in the middle of a step" if full.before_update else "while it updated the weights"
    last = complete_checkpoints(checkpoints) if checkpoints else []
    kept = f"The last checkpoint, {last[-1].path}, is intact. " if last else "There is no checkpoint yet. "
    return f"{full} {when}.\n{_table(full, seen)}\n{kept}Try {next_technique(spec, refuses)}"


def next_technique(spec: Spec, refuses: Refuses) -> str:
    """The first that is not in use and that the backend honours, as it is written in a spec."""
    for key, value, remark in _ladder(spec):
        if (changed := _with(spec, key, value)) is not None and not refuses(changed):
            return f"{key}: {value} ({remark})"
    return "a shorter data.seq_len, or a smaller model"


def _ladder(spec: Spec) -> Iterator[tuple[str, Any, str]]:
    memory = spec.memory if isinstance(spec.memory, MemorySection) else MemorySection()
    micro = spec.micro_batch
    if smaller := max((part for part in range(1, micro) if micro % part == 0), default=0):
        yield "batch.micro", smaller, "the global batch and what is learned stay the same"
    if memory.loss_chunk == "none":
        yield "memory.loss_chunk", "auto", "the same loss without the whole of the logits"
    if not memory.checkpointing.enabled:
        yield "memory.checkpointing", "auto", "the same losses for about a third more time"
    if spec.precision.dtype == "fp32":
        yield "precision", "bf16", "halves most activations"
    yield "memory.offload.optimizer", "cpu", "the optimizer's state moves to the host"
    yield "memory.sharding", "parameters", "the model is divided"


def _with(spec: Spec, key: str, value: Any) -> Spec | None:
    """`spec` with one key changed; None where that is no valid spec or changes nothing."""
    tree: dict[str, Any] = dump_spec(spec)
    section = tree
    *path, last = key.split(".")
    for name in path:
        if not isinstance(section.get(name), dict):
            section[name] = {}
        section = section[name]
    section[last] = value
    try:
        changed = Spec.model_validate(tree)
    except ValidationError:
        return None
    return None if changed == spec else changed


def _table(full: OutOfMemory, seen: StepMemory | None) -> str:
    """By category where a step was counted; else what the engine knows of, and what is left of the total."""
    peaks: ByPlace = seen.peaks if seen else {full.device: full.memory.categories or {}}
    rows = [f"  {place} held {format_categories(held)}" for place, held in peaks.items() if held]
    if full.memory.live is not None:
        rows.append(f"  live tensors at that moment: {format_bytes(full.memory.live.bytes)}")
    return "\n".join(rows) or "  what it held is not known"
