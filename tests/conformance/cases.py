"""The trainings that every backend must agree on, as spec dictionaries."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    gradient_factors: Mapping[int, float] = field(default_factory=dict)
    """What is wrong with the gradients, by 0-based step; the losses stay right. -1 stands for every step."""
    loss_factors: Mapping[int, float] = field(default_factory=dict)
    """What is wrong with the losses, and with the gradients with them."""
    wrong_rank: int | None = None
    """Of which rank; None for all."""
    keep_weights: bool = False
    audited: bool = False
    """Whether two steps are taken under the ledger, as in every run: they cost as much as ten others, so one
    training of each lane is enough."""

    def described(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "backend": self.backend,
            "spec": self.spec,
            "gradient_factors": {str(step): factor for step, factor in self.gradient_factors.items()},
            "loss_factors": {str(step): factor for step, factor in self.loss_factors.items()},
            "wrong_rank": self.wrong_rank,
            "keep_weights": self.keep_weights,
            "audited": self.audited,
        }


@dataclass(frozen=True)
class Lane:
    """A way to run a spec: a backend, its sharding, how many processes, and what is offloaded to the CPU."""

    backend: str
    sharding: str = "none"
    world: int = 1
    offload: tuple[str, ...] = ()

    def __str__(self) -> str:
        stage = f"-zero{SHARDING.index(self.sharding)}" if self.backend == "deepspeed" else ""
        return f"{self.backend}{stage}{''.join(f'-{what}' for what in self.offload)}-x{self.world}"


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
    stability: Section | None = None
    memory: Section = field(default_factory=dict)
    manual: Section | None = None
    eval_every: int = 0
    gradient_factors: Mapping[int, float] = field(default_factory=dict)
    loss_factors: Mapping[int, float] = field(default_factory=dict)
    wrong_rank: int | None = None
    keep_weights: bool = False
    audited: bool = False
    loss_chunk: int | str = "auto"

    def on(self, lane: Lane) -> Case:
        spec = {
            "model": self.model,
            "data": {"source": "synthetic", "seq_len": 32, "tokens": 40_000, "masked": self.masked},
            "batch": {"global": 8, "micro": 8 // (self.accumulation * lane.world)},
            "train": {"steps": self.steps, "clip": self.clip, "eval_every": self.eval_every},
            "stability": self.stability,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "precision": self.precision,
            "memory": {
                "sharding": lane.sharding,
                "offload": dict.fromkeys(lane.offload, "cpu"),
                "loss_chunk": self.loss_chunk,
                **self.memory,
            },
            "manual": self.manual,
        }
        wrong_rank = None if self.wrong_rank is None else self.wrong_rank % lane.world
        return Case(
            f"{self.name}@{lane}",
            lane.backend,
            spec,
            self.gradient_factors,
            self.loss_factors,
            wrong_rank,
            self.keep_weights,
            self.audited,
        )


TRAININGS = [
    Training("adamw", audited=True),
    Training("sgd", SGD_UNCLIPPED, clip=None),
    Training("sgd-clipped", SGD_CLIPPED, clip=BITING_CLIP),
]
ONE_UPDATE = [
    Training("one-adamw", steps=1, schedule={"name": "constant"}, keep_weights=True),
    Training("one-sgd", SGD_UNCLIPPED, clip=None, steps=1, schedule={"name": "constant"}, keep_weights=True),
]
CONTROLS = [
    Training("lr-off", {**SGD_UNCLIPPED, "lr": SGD_UNCLIPPED["lr"] * 1.01}, clip=None),
    Training("gradients-doubled", SGD_UNCLIPPED, clip=None, gradient_factors={-1: 2.0}),
]
FP16 = {"dtype": "fp16", "initial_scale_power": 20, "loss_scale_window": 3, "hysteresis": 2}
"""A scale that overflows at once, comes down, and grows into overflow again."""
BF16 = [
    Training("bf16", precision="bf16"),
    Training("bf16-weights", precision={"dtype": "bf16", "weights": "bf16"}),
]
MOVING_SCALES = [
    Training("fp16", precision=FP16),
    Training("fp16-sgd", SGD_UNCLIPPED, clip=None, precision=FP16),
]
FORCED_OVERFLOWS = Training(
    "fp16-forced",
    precision={"dtype": "fp16", "initial_scale_power": 8, "loss_scale_window": 3, "hysteresis": 2},
    gradient_factors=dict.fromkeys((3, 4, 5, 11, 16), math.inf),
    wrong_rank=-1,
)
"""Overflows planted on the last rank, at a scale too small for others."""
PLANTED_NAN = Training(
    "planted-nan",
    SGD_UNCLIPPED,
    clip=None,
    stability={"stop_after": 10},
    gradient_factors={6: math.nan, 13: math.nan},
    wrong_rank=-1,
)
PLANTED_SPIKE = Training(
    "planted-spike", stability={"grad_norm": 100.0}, gradient_factors={4: 1e4, 12: 1e4}, wrong_rank=-1
)
PLANTED_LOSS = Training(
    "planted-loss-spike",
    stability={"loss_spike": 2.0, "window": 3},
    loss_factors={6: 9.0, 13: 9.0},
    wrong_rank=-1,
)
"""On one rank of two the mean is 5 times what it was."""
CHUNKED = Training("chunked", SGD_UNCLIPPED, clip=None, loss_chunk=8)
EVALUATED = Training("evaluated", eval_every=5)
