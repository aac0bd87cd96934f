"""The ladder of memory techniques as it is taught, and as a spec can climb it: each rung on those before it.

The claims are those made for GPT-2 Large. 774 million parameters with Adam in fp32 are 12.4 GB before any
activation, so 6 GB for mixed precision cannot come from autocast over fp32 weights, the second rung here.
"""

from __future__ import annotations

from dataclasses import dataclass

from xtrain.errors import RequestError
from xtrain.spec.nearest import divisors, either, neighbours
from xtrain.spec.tree import Spec


@dataclass(frozen=True)
class ClaimedRung:
    name: str
    memory: str
    """As claimed."""
    speed: str


@dataclass(frozen=True)
class LadderPlace:
    """Which lane is which rung of whose ladder."""

    ladder: str
    """The backend, with its processes."""
    rung: int
    """Index into RUNGS."""


RUNGS = (
    ClaimedRung("plain fp32", "12 GB", "100%"),
    ClaimedRung("+ mixed precision", "6 GB (-50%)", "115%"),
    ClaimedRung("+ gradient accumulation", "6 GB", "110%"),
    ClaimedRung("+ activation checkpointing", "4 GB (-67%)", "90%"),
    ClaimedRung("+ model sharding", "2 GB per device", "80%"),
)
MICRO_SHARE = 4
"""Accumulation over as many micro-batches, where the spec itself does not accumulate."""


def rung_overrides(spec: Spec, world: int) -> list[list[str]]:
    """`--set` words for each of RUNGS, on `world` processes; RequestError where they cannot share a batch."""
    share, left = divmod(spec.batch.global_, world)
    if left:
        fitting = neighbours(world, divisors(spec.batch.global_))
        raise RequestError(
            f"--ladder: batch.global {spec.batch.global_} cannot be shared by {world} processes; expected a "
            f"number that divides it, nearest: {either(fitting)}; or change batch.global"
        )
    whole, small = f"batch.micro={share}", f"batch.micro={_smaller(share, spec.batch.micro)}"
    checkpointed, sharded = (
        "memory={checkpointing: auto}",
        "memory={checkpointing: auto, sharding: parameters}",
    )
    return [
        ["precision=fp32", whole, "memory={}"],
        ["precision=bf16", whole, "memory={}"],
        ["precision=bf16", small, "memory={}"],
        ["precision=bf16", small, checkpointed],
        ["precision=bf16", small, sharded],
    ]


def _smaller(share: int, micro: int | None) -> int:
    """The spec's own micro-batch where it accumulates; else the largest divisor up to a quarter."""
    if micro is not None and micro < share:
        return micro
    return max((n for n in range(1, share // MICRO_SHARE + 1) if share % n == 0), default=1)
