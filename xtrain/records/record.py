"""record.json: what a run was, what it cost and what came of it. Reports are made from it alone.

The models here are both the schema and the guard: a record may come from anywhere. Keys that a later
version adds are ignored; a key that changes its meaning changes `schema_version`.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError

from xtrain.contract import Counter, Memory, StepMemory
from xtrain.errors import RequestError
from xtrain.measure.speed import Speed, TimeSplit
from xtrain.records.metrics import Natural
from xtrain.records.rundir import write_json

SCHEMA_VERSION: Final = 1
LARGEST_RECORD_BYTES = 64 << 20

Status: TypeAlias = Literal["done", "stopped", "failed", "interrupted"]


def _finite(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    json.dumps(value, allow_nan=False)  # JsonValue lets NaN pass, which JSON does not know
    return value


JsonObject: TypeAlias = Annotated[dict[str, JsonValue], AfterValidator(_finite)]


class RecordError(RequestError):
    """A record that is missing, damaged, or not what it says."""


class Part(BaseModel):
    """Strict, frozen, finite; unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class DataFacts(Part):
    """What was trained on."""

    description: str
    hash: str | None
    """Of the tokens: equal hashes, equal data."""
    portable: bool
    """Whether another machine would have the same; stdlib's text depends on Python's version."""


class ModelFacts(Part):
    description: str
    parameters: Natural
    """Tied ones once, over all ranks."""
    layers: Natural | None = None
    """None where the model does not tell."""
    hidden: Natural | None = None


class Totals(Part):
    """Of the steps in metrics.jsonl."""

    steps: Natural
    """The last finished update, 1-based; 0 when there was none."""
    tokens: Natural
    skipped: Natural
    seconds: float | None
    """From the first update to the last of this process, evaluation and checkpoints included."""


class LossFacts(Part):
    """Training losses, those of the first and the last update among them; None where not finite."""

    first: float | None
    last: float | None
    min: float | None


class Evaluation(Part):
    """On the held-out part."""

    last: float
    last_step: Natural
    min: float
    min_step: Natural


class CounterFacts(Part):
    """One way of counting; see xtrain.contract.Counter."""

    bytes: Natural
    peak_bytes: Natural | None
    method: Literal["counter", "sampled", "unavailable"]


class StepPeaks(Part):
    """See xtrain.contract.StepMemory."""

    step: Natural
    peaks: dict[str, dict[str, Natural]]

    @classmethod
    def of(cls, memory: StepMemory) -> StepPeaks:
        return cls(step=memory.step, peaks={place: dict(found) for place, found in memory.peaks.items()})


class RankMemory(Part):
    """What one rank held. Three ways of counting, never mixed; None where one is not to be had."""

    rank: Natural
    live: CounterFacts | None
    reserved: CounterFacts | None
    rss: CounterFacts | None
    rss_before_bytes: Natural | None = None
    """Resident set before the model was built: what the imports cost."""
    categories: dict[str, Natural] | None
    """On the device, at the end."""
    step_peaks: StepPeaks | None = None
    """Everywhere, when a step held most."""
    save_copy_bytes: Natural | None = None
    """On the host, kept by saves in the background from one to the next; None where there was none."""

    @classmethod
    def of(
        cls,
        rank: int,
        memory: Memory,
        resident: Counter,
        sampled_bytes: int | None = None,
        step: StepMemory | None = None,
    ) -> RankMemory:
        """`sampled_bytes`, the most a trace saw, is the live peak where the device has no counter for it."""
        live = memory.live
        if live is not None and live.peak_bytes is None and sampled_bytes is not None:
            live = Counter(live.bytes, max(live.bytes, sampled_bytes), "sampled")
        return cls(
            rank=rank,
            live=_counter(live),
            reserved=_counter(memory.reserved),
            rss=_counter(resident),
            categories=None if memory.categories is None else dict(memory.categories),
            step_peaks=StepPeaks.of(step) if step else None,
        )


class MatmulFacts(Part):
    """What a large matrix product reaches on the devices of this run (xtrain/measure/matmul.py)."""

    dtype: str
    flops_per_second: Annotated[float, Field(ge=1, lt=1e30)]
    """Of all processes together."""
    datasheet: Annotated[float, Field(ge=1, lt=1e30)] | None = None
    """What the vendor promises, where it is known."""


class RankBusy(Part):
    """How busy one rank kept what it ran on; None where it cannot be known."""

    device: Annotated[float, Field(ge=0, le=1)] | None
    """Share of the time in which the device had work, as its vendor counts it: the mean of samples at the
    ends of logging windows. The CPU has no such counter."""
    host_cores: Annotated[float, Field(ge=0, lt=1e6)] | None
    """CPU seconds of the process per second: how many of the host's cores it kept busy."""


class Predicted(Part):
    """What the planner said before the run of a step like that of `step_peaks`, for one process."""

    peak_bytes: dict[str, dict[str, Natural]] | None = None
    """By place and category; None where they could not be known."""
    at: dict[str, str] | None = None
    """The moment of the step at which each place is fullest."""
    reason: str | None = None
    """Why there is nothing to compare."""
    save_copy_bytes: Natural = 0
    """As in RankMemory."""


class RunRecord(Part):
    """The whole of record.json. Bytes are integers, seconds floats, what was not measured is null."""

    schema_version: Literal[1] = SCHEMA_VERSION
    status: Status
    failure: str | None = None
    """Why it failed, for people."""
    backend: str
    world: Annotated[int, Field(ge=1)]
    spec: JsonObject
    """Complete: every key, defaults included."""
    settings: JsonObject
    """What the backend decided."""
    notes: list[str]
    environment: JsonObject
    threads: Annotated[int, Field(ge=1)] | None
    """For the CPU's arithmetic, per process."""
    matmul_precision: str | None
    """Of fp32 matrix products, as the engine's library names it."""
    data: DataFacts
    model: ModelFacts
    totals: Totals
    loss: LossFacts
    eval: Evaluation | None
    speed: Speed | None
    time_split: TimeSplit | None
    rank_seconds: list[dict[str, float]] | None = None
    """By rank: of its traced steps together, by phase."""
    matmul: MatmulFacts | None = None
    """Measured at the end of runs that are long enough for it not to matter."""
    busy: list[RankBusy] | None = None
    """By rank, over the whole run."""
    memory: list[RankMemory]
    """By rank."""
    predicted: JsonObject | None = None
    """A Predicted; None in records of runs that did not predict."""


def prediction(record: RunRecord) -> Predicted | None:
    """What was predicted; None where that is nothing this version knows."""
    try:
        return None if record.predicted is None else Predicted.model_validate(record.predicted)
    except ValidationError:
        return None


def write_record(path: Path, record: RunRecord) -> None:
    write_json(path, record.model_dump(mode="json"))


def load_record(path: Path) -> RunRecord:
    """The record at `path`, a file or a run directory; it is not trusted.

    Raises RecordError with the key that is wrong.
    """
    file = path / "record.json" if path.is_dir() else path
    try:
        return RunRecord.model_validate_json(_read_capped(file))
    except ValidationError as error:
        raise RecordError(f"{file} is not a record: {_first_problem(error)}") from None


def _read_capped(file: Path) -> bytes:
    try:
        if not file.is_file():
            raise RecordError(f"{file}: no such file; expected the record of a run")
        with file.open("rb") as opened:
            data = opened.read(LARGEST_RECORD_BYTES + 1)
    except OSError as error:
        raise RecordError(f"cannot read {file}: {error.strerror}") from error
    if len(data) > LARGEST_RECORD_BYTES:
        raise RecordError(f"{file} is too large for a record: more than {LARGEST_RECORD_BYTES} bytes")
    return data


def _first_problem(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_input=False)
    key = ".".join(str(part) for part in problems[0]["loc"])
    if key == "schema_version":
        return f"schema_version: this xtrain reads version {SCHEMA_VERSION}"
    more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{f'{key}: ' if key else ''}{problems[0]['msg']}{more}"


def _counter(counter: Counter | None) -> CounterFacts | None:
    return None if counter is None else CounterFacts(**asdict(counter))
