"""What a plan does not count, or counts in a way that people should know of."""

from __future__ import annotations

from collections.abc import Iterator

from xtrain.spec.tree import Spec

COMPILED = (
    "train.compile is not predicted: compiled code fuses what is counted one by one here; the figures are "
    "those of the same training uncompiled."
)
DROPPED = (
    "Dropout: on a device a byte is counted for each element that may be dropped, and nothing in attention, "
    "as fused kernels do it; on the host the tensors that torch multiplies by there."
)
TRACED = "The kernels counted are the host's; attention and dropout may keep less on another device."


def plan_notes(spec: Spec) -> Iterator[str]:
    """A sentence or two each."""
    if spec.train.compile:
        yield COMPILED
    if spec.model.preset is None:
        yield TRACED
    elif spec.model.dropout > 0:
        yield DROPPED
