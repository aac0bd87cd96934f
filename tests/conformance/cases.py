"""The trainings that every backend must agree on, as spec dictionaries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Section = dict[str, Any]

ADAMW: Section = {"name": "adamw", "lr": 2e-3}
SGD_UNCLIPPED: Section = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
SGD_CLIPPED: Section = {"name": "sgd", "lr": 0.5}
BITING_CLIP = 0.3
"""Below every gradient norm of these runs (a test checks it)."""

STEPS = 20
SHARDING = ("none", "optimizer", "gradients", "parameters")


@dataclass(frozen=True)
class Case:
    """One training on one lane."""

    name: str
    backend: str
    spec: Section
    doubled_gradients: bool = False
    """A control: the same losses, gradients twice too large."""
    keep_weights: bool = False

    def described(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "backend": self.backend,
            "spec": self.spec,
            "doubled_gradients": self.doubled_gradients,
            "keep_weights": self.keep_weights,
        }


@dataclass(frozen=True)
class Lane:
    """A way to run a spec: a backend, its sharding, and how many processes."""

    backend: str
    sharding: str = "none"
    world: int = 1

    def __str__(self) -> str:
        stage = f"-zero{SHARDING.index(self.sharding)}" if self.backend == "deepspeed" else ""
        return f"{self.backend}{stage}-x{self.world}"


@dataclass(frozen=True)
class Training:
    """What is trained, whatever the lane; accumulation is 4 on one process and on two."""

    name: str
    optimizer: Section = field(default_factory=lambda: dict(ADAMW))
    clip: float | None = 1.0
    precision: Any = "fp32"
    masked: float = 0.0
    steps: int = STEPS
    accumulation: int = 4
    schedule: Section = field(default_factory=lambda: {"name": "cosine", "warmup": 4})
    model: Section = field(
        default_factory=lambda: {"preset": "gpt2-nano", "layers": 2, "hidden": 64, "heads": 2}
    )
    doubled_gradients: bool = False
    keep_weights: bool = False

    def on(self, lane: Lane) -> Case:
        spec = {
            "model": self.model,
            "data": {"source": "synthetic", "seq_len": 32, "tokens": 40_000, "masked": self.masked},
            "batch": {"global": 8, "micro": 8 // (self.accumulation * lane.world)},
            "train": {"steps": self.steps, "clip": self.clip},
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "precision": self.precision,
            "memory": {"sharding": lane.sharding},
        }
        return Case(f"{self.name}@{lane}", lane.backend, spec, self.doubled_gradients, self.keep_weights)


TRAININGS = [
    Training("adamw"),
    Training("sgd", SGD_UNCLIPPED, clip=None),
    Training("sgd-clipped", SGD_CLIPPED, clip=BITING_CLIP),
    Training("masked", SGD_UNCLIPPED, clip=None, masked=0.3),
]
ONE_UPDATE = [
    Training("one-adamw", steps=1, schedule={"name": "constant"}, keep_weights=True),
    Training("one-sgd", SGD_UNCLIPPED, clip=None, steps=1, schedule={"name": "constant"}, keep_weights=True),
]
CONTROLS = [
    Training("lr-off", {**SGD_UNCLIPPED, "lr": SGD_UNCLIPPED["lr"] * 1.01}, clip=None),
    Training("gradients-doubled", SGD_UNCLIPPED, clip=None, doubled_gradients=True),
]
BF16 = Training("bf16", precision="bf16")
