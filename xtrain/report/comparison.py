"""report.json: what a report says, as models. Everything people are shown is made from this alone."""

from __future__ import annotations

from typing import Literal, TypeAlias

from xtrain.errors import EXIT_DONE, EXIT_FAILED, EXIT_REQUEST
from xtrain.lanes import Outcome
from xtrain.measure.flops import FieldSpeed
from xtrain.measure.speed import Speed, TimeSplit
from xtrain.records.metrics import Natural
from xtrain.records.record import CounterFacts, Evaluation, JsonObject, LossFacts, MatmulFacts, Part, Status
from xtrain.report.agreement import Agreement, Difference

Tone: TypeAlias = Literal["good", "bad", "plain"]
Topic: TypeAlias = Literal["losses", "speed", "memory", "bottleneck", "choice"]


class Curve(Part):
    """A figure by step, thinned out for drawing."""

    steps: list[Natural]
    values: list[float]


class Figures(Part):
    """Of a lane that finished. What was not measured is None."""

    backend: str
    world: int
    repeats: Natural
    status: Status
    precision: str | None
    rung: str | None
    """What `memory: auto` chose; None without it."""
    threads: int | None
    matmul_precision: str | None
    data_hash: str | None
    parameters: Natural
    steps: Natural
    skipped: Natural
    environment: JsonObject
    spec: JsonObject
    loss: LossFacts
    eval: Evaluation | None
    loss_difference: Difference | None
    """None for the reference itself, and where no step has a loss in both."""
    grad_norm_difference: Difference | None
    agreement: Agreement | None
    """Of the earliest departure in any repeat. None where the curves cannot be held against each other, and
    for a reference that ran once."""
    repeat_difference: Difference | None
    """Between the lane's own repeats; None with one."""
    unmatched_steps: Natural
    """Steps that only one of the two has, or whose loss is finite in only one of them; the worst repeat's."""
    speed: Speed | None
    """Of the repeat in the middle."""
    repeat_rates: list[float]
    """Tokens per second of each repeat, in order."""
    field_speed: FieldSpeed | None
    matmul: MatmulFacts | None
    time_split: TimeSplit | None
    imbalance: float | None
    """How much longer than the mean the slowest rank's forward takes; None with one rank."""
    device_busy: float | None
    """Share of the time, as the devices' vendor tells: the mean over ranks and repeats."""
    host_cores: float | None
    """How many of the host's cores all ranks together kept busy: the mean over the repeats."""
    live: CounterFacts | None
    """Memory is that of the rank and repeat that held most."""
    reserved: CounterFacts | None
    rss: CounterFacts | None
    step_peaks: dict[str, dict[str, Natural]]
    """Of one step at its fullest: by place, the fullest device first and the host last, then by category."""
    predicted: dict[str, dict[str, Natural]]
    """Of the same step, by place and category: those of `step_peaks` that were predicted, in their order."""
    loss_curve: Curve
    memory_curves: dict[str, Curve]
    """Bytes by step, by counter."""


class LaneReport(Part):
    name: str
    outcome: Outcome
    reason: str | None
    """Why there are no figures."""
    figures: Figures | None


class Verdict(Part):
    """What the figures mean, in words."""

    topic: Topic
    tone: Tone
    headline: str
    details: list[str]


class Rung(Part):
    """One rung of the ladder, claimed and measured. Shares are of the first rung's."""

    lane: str
    name: str
    claimed_memory: str
    claimed_speed: str
    set_to: str = ""
    """Precision and sequences per pass that it had here; empty where it did not finish."""
    memory_bytes: Natural | None
    memory_share: float | None
    speed_share: float | None


class Comparison(Part):
    """report.json."""

    schema_version: Literal[1] = 1
    title: str
    """Name of the spec's file, or how many runs were merged."""
    reference: str | None
    """The lane that the others are held against: the first that finished; None when none did."""
    lanes: list[LaneReport]
    warnings: list[str]
    """What makes the lanes unlike, a sentence each; empty when nothing does."""
    verdicts: list[Verdict]
    ladder: list[Rung]
    """Empty unless it was asked for."""

    @property
    def finished(self) -> list[tuple[str, Figures]]:
        return [(lane.name, lane.figures) for lane in self.lanes if lane.figures]

    @property
    def unfinished(self) -> list[LaneReport]:
        return [lane for lane in self.lanes if not lane.figures]

    @property
    def exit_code(self) -> int:
        """1 when a lane failed after its start, 2 when every lane was refused, else 0."""
        outcomes = {lane.outcome for lane in self.lanes}
        if "failed" in outcomes:
            return EXIT_FAILED
        return EXIT_DONE if "finished" in outcomes else EXIT_REQUEST
