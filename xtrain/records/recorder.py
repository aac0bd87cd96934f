"""What the loop saw, on its way to metrics.jsonl, to people, and at the end into the record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xtrain.contract import Counter, Engine, Resolved
from xtrain.data import Dataset
from xtrain.loop import WARMUP_STEPS, Loop
from xtrain.measure.machine import environment, resident_bytes
from xtrain.measure.matmul import gather_matmul
from xtrain.models.source import NotedSource
from xtrain.records.figures import StepFigures
from xtrain.records.metrics import MetricsLog, StepRecord, each_step
from xtrain.records.progress import Progress
from xtrain.records.record import (
    DataFacts,
    MatmulFacts,
    ModelFacts,
    Predicted,
    RankBusy,
    RankMemory,
    RunRecord,
    Status,
)
from xtrain.records.rundir import RunDirectory
from xtrain.records.trackers import Trackers
from xtrain.spec import dump_spec


class Silent:
    """The observer of every rank but the first."""

    def saw(self, record: StepRecord) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class Recorder:
    """Writes each update down as it comes. Holds no history, so its size does not grow with the run."""

    def __init__(self, directory: RunDirectory, progress: Progress, trackers: Trackers) -> None:
        self._log = MetricsLog(directory.metrics)
        self._trackers = trackers
        self._progress = progress

    def saw(self, record: StepRecord) -> None:
        self._log.append(record)
        self._trackers.log(record)
        self._progress.update(record)

    def say(self, text: str) -> None:
        """For people, without breaking the bar."""
        self._progress.say(text)

    def sync(self) -> None:
        """Return once every line is on the disk."""
        self._log.sync()

    def close(self) -> None:
        self._log.close()
        self._trackers.close()
        self._progress.close()


@dataclass(frozen=True)
class Facts:
    """What the record says about a run beside its steps."""

    resolved: Resolved
    data: Dataset
    model: NotedSource
    engine: Engine
    predicted: Predicted


def rank_memory(engine: Engine, rank: int, before: Counter, loop: Loop) -> RankMemory:
    """What this rank holds at the end; `before` is its resident set before the model was built."""
    memory = RankMemory.of(rank, engine.memory(), resident_bytes(), loop.peak_live_bytes, loop.step_memory)
    kept = loop.checkpointer.buffers.bytes if loop.checkpointer else 0
    return memory.model_copy(update={"rss_before_bytes": before.bytes, "save_copy_bytes": kept or None})


@dataclass(frozen=True)
class Gathered:
    """What the ranks say at the end of a run, in their order."""

    memory: list[RankMemory]
    rank_seconds: list[dict[str, float]] | None = None
    busy: list[RankBusy] | None = None
    matmul: MatmulFacts | None = None


def gather(engine: Engine, memory: RankMemory, busy: RankBusy, loop: Loop, seconds: float) -> Gathered:
    """Every rank's, on every rank, after a run of `seconds`. Collective."""
    memories = engine.gather(memory.model_dump(mode="json"))
    spans: list[Any] = engine.gather(loop.phase_seconds)
    uses = engine.gather(busy.model_dump(mode="json"))
    return Gathered(
        [RankMemory.model_validate(one) for one in memories],
        [dict(one) for one in spans],
        [RankBusy.model_validate(one) for one in uses],
        gather_matmul(engine, seconds),
    )


def make_record(
    facts: Facts,
    directory: RunDirectory,
    status: Status,
    failure: str | None,
    seconds: float,
    gathered: Gathered,
    start: int,
) -> RunRecord:
    """record.json, from the run directory's own metrics.jsonl and the facts.

    Speed is that of this process: of the steps after `start`, where it began or resumed.
    """
    steps = each_step(directory.metrics) if directory.metrics.exists() else ()
    figures = StepFigures(steps, start, WARMUP_STEPS)
    return RunRecord(
        status=status,
        failure=failure,
        backend=facts.resolved.backend,
        world=facts.resolved.world,
        spec=dump_spec(facts.resolved.spec),
        settings=dict(facts.resolved.settings),  # type: ignore[arg-type]
        notes=list(facts.resolved.notes),
        environment=dict(environment()),  # type: ignore[arg-type]
        threads=facts.engine.threads,
        matmul_precision=facts.engine.matmul_precision,
        data=DataFacts(
            description=facts.data.description, hash=facts.data.content_hash, portable=facts.data.portable
        ),
        model=ModelFacts(
            description=facts.model.description,
            parameters=facts.engine.parameter_count,
            layers=facts.model.shape[0] if facts.model.shape else None,
            hidden=facts.model.shape[1] if facts.model.shape else None,
        ),
        totals=figures.totals(seconds),
        loss=figures.loss(),
        eval=figures.evaluation,
        speed=figures.speed.speed(),
        time_split=figures.time_split.split(),
        rank_seconds=gathered.rank_seconds,
        matmul=gathered.matmul,
        busy=gathered.busy,
        memory=gathered.memory,
        predicted=facts.predicted.model_dump(mode="json"),
    )
