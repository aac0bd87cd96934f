"""Going on from a checkpoint: which one, and whether it is of the same training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from xtrain.checkpoints.format import Checkpoint, CheckpointError, State, complete_checkpoints
from xtrain.checkpoints.manager import latest
from xtrain.errors import RequestError
from xtrain.spec import dump_spec
from xtrain.spec.keys import covering, printed
from xtrain.spec.tree import Spec

MAY_CHANGE = (
    "batch.micro",
    "checkpoint",
    "deepspeed",
    "launch",
    "log",
    "manual",
    "memory",
    "stability",
    "train.compile",
    "train.eval_every",
    "train.steps",
)
"""Keys that do not change what is learned, or that people lengthen a run by."""


@dataclass(frozen=True)
class Start:
    """Where a run begins: at a checkpoint, or at step 0."""

    checkpoint: Checkpoint | None
    state: State | None

    @property
    def step(self) -> int:
        return self.state.step if self.state else 0


def find_start(resume: Path | None, spec: Spec, data_hash: str, allow_changed: bool) -> Start:
    """The start that `--resume` asks for.

    Raises CheckpointError when there is nothing to resume or it is damaged, RequestError when it is of
    another training: other data, or a key outside MAY_CHANGE that differs and was not insisted on.
    """
    checkpoint = latest(resume) if resume else None
    if checkpoint is None:
        return Start(None, None)
    state = _checked(checkpoint)
    changed = [
        f"{key}: {printed(old)} there, {printed(new)} here"
        for key, old, new in differences(state.spec, dump_spec(spec))
        if covering(key, MAY_CHANGE) is None
    ]
    if state.data_hash != data_hash:
        changed.append(f"the data itself: hash {state.data_hash[:12]} there, {data_hash[:12]} here")
    if changed and not allow_changed:
        listed = "\n  ".join(changed)
        raise RequestError(
            f"{checkpoint.path} is of another training:\n  {listed}\n"
            f"  These may change: {', '.join(MAY_CHANGE)}. Use --allow-changed to insist"
        )
    return Start(checkpoint, state)


def _checked(checkpoint: Checkpoint) -> State:
    """Its state, both tensor files looked at too: nothing may be touched for one that cannot be read."""
    try:
        checkpoint.check_files()
        return checkpoint.state()
    except CheckpointError as error:
        earlier = [c for c in complete_checkpoints(checkpoint.path.parent) if c.step < checkpoint.step]
        hint = f"; the one before it: --resume {earlier[-1].path}" if earlier else ""
        raise CheckpointError(f"{error}{hint}") from error


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
