"""Going on from a checkpoint: which one, and whether it is of the same training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from xtrain.checkpoints.format import Checkpoint, State
from xtrain.checkpoints.select import Selected
from xtrain.contract import JSON, Engine
from xtrain.errors import RequestError
from xtrain.spec import dump_spec
from xtrain.spec.keys import covering, printed
from xtrain.spec.tree import Spec

MAY_CHANGE = (
    "batch.micro",
    "checkpoint",
    "data.path",
    "data.tokenizer",
    "deepspeed",
    "launch",
    "log",
    "manual",
    "memory",
    "model.init_from",
    "stability",
    "train.compile",
    "train.eval_every",
    "train.steps",
)
"""Keys that do not change what is learned, or that people lengthen a run by. Of places, what is there is
compared instead: the tokens by their hash, the weights by being the checkpoint's."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or at step 0."""

    checkpoint: Checkpoint | None
    state: State | None
    damaged: Sequence[tuple[Checkpoint, str]] = ()
    """Newer ones that were passed over, and why."""

    @property
    def step(self) -> int:
        return self.state.step if self.state else 0


def find_start(
    selected: Selected, spec: Spec, data_hash: str, model_hash: str | None, allow_changed: bool
) -> Start:
    """The start at a checkpoint that is known to be sound.

    Raises RequestError when it is of another training: other data, or a key outside MAY_CHANGE that differs
    and was not insisted on. `model.hf` may change where the config that it names has the same `model_hash`.
    """
    checkpoint = selected.checkpoint
    if checkpoint is None:
        return Start(None, None)
    state = checkpoint.state()
    same_model = model_hash is not None and state.model_hash == model_hash
    may_change = (*MAY_CHANGE, "model.hf") if same_model else MAY_CHANGE
    changed = [
        f"{key}: {printed(old)} there, {printed(new)} here"
        for key, old, new in differences(state.spec, dump_spec(spec))
        if covering(key, may_change) is None
    ]
    if state.data_hash != data_hash:
        changed.append(f"the data itself: hash {state.data_hash[:12]} there, {data_hash[:12]} here")
    if changed and not allow_changed:
        listed = "\n  ".join(changed)
        raise RequestError(
            f"{checkpoint.path} is of another training:\n  {listed}\n"
            f"  These may change: {', '.join(MAY_CHANGE)}. Use --allow-changed to insist"
        )
    return Start(checkpoint, state, selected.damaged)


def agreed(engine: Engine, own: Start) -> Start:
    """Rank 0's start, on every rank: it alone has read every byte. Collective."""
    place: list[JSON] | None = [str(own.checkpoint.path), own.checkpoint.step] if own.checkpoint else None
    first: Any = engine.gather(place)[0]
    if first == place:
        return own
    if first is None:
        return Start(None, None)
    checkpoint = Checkpoint(Path(first[0]), first[1])
    return Start(checkpoint, checkpoint.state())


def differences(
    old: Mapping[str, JsonValue], new: Mapping[str, JsonValue], prefix: str = ""
) -> Iterator[tuple[str, JsonValue, JsonValue]]:
    """(dotted key, old value, new value) wherever two complete specs differ."""
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from differences(before, after, f"{prefix}{name}.")
        elif before != after:
            yield f"{prefix}{name}", before, after
