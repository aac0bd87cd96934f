"""Where an engine keeps a step's bytes: what a backend may tell the planner, and how a peak comes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

from xtrain.contract import HOST as HOST
from xtrain.plan.step import Moment, Step

if TYPE_CHECKING:
    from xtrain.contract import Job
    from xtrain.spec.tree import Spec

Categories: TypeAlias = "Counter[str]"
"""Bytes by contract.MEMORY_CATEGORIES."""
DEVICE = "device"
"""The place that has no name yet: what the plan is for."""


class Layout(Protocol):
    """How an engine lays out one process's part of a training."""

    @property
    def home(self) -> str:
        """The place of stem, head and loss."""
        ...

    def held(self, step: Step, moment: Moment) -> Mapping[str, Categories]:
        """By place: the training state, and what the pass holds at `moment`."""
        ...

    def sent_bytes(self, step: Step) -> int:
        """What one process sends to others in a step, collectives being rings; 0 where it has no others."""
        ...


@runtime_checkable
class Planned(Protocol):
    """The further methods of a Backend whose engines the planner knows."""

    name: str

    def place(self) -> str:
        """Where it computes on this machine: HOST or DEVICE. Imports nothing heavy."""
        ...

    def layout(self, spec: Spec, world: int, device: str) -> Layout | None:
        """How its engine will lay out `spec` with `world` processes; imports nothing heavy.

        `device` is what the place is called at which it computes. None where the layout is known only once
        the model is built.
        """
        ...

    def room_bytes(self, job: Job) -> int | None:
        """What this process's device has for a training; None where nobody says. May import torch."""
        ...


@dataclass(frozen=True)
class Height:
    """One place at its fullest moment."""

    name: str
    """Of the moment."""
    bytes: Categories

    @property
    def total(self) -> int:
        return self.bytes.total()


def peaks(step: Step, layout: Layout) -> dict[str, Height]:
    """By place, each at its own fullest moment."""
    found: dict[str, Height] = {}
    for moment in step.moments():
        for place, held in layout.held(step, moment).items():
            if place not in found or held.total() > found[place].total:
                found[place] = Height(moment.name, held)
    return found
