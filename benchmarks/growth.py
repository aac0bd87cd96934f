"""What a step costs as things grow: tokens, data, steps, time. `python -m benchmarks.growth --help`.

Counted where that is possible, so that a busy machine serves: operations (torch's flop counter), calls of
Python and C functions, live objects. Seconds stand beside the counts.

- *tokens*: a step's operations are linear in them.
- *data*: a batch takes as many calls from a file of 1 MB as from one of 10 GB (sparse: it takes no room).
- *steps*: so they are at step 0 and at step 1,000,000, and for a whole turn of the loop with its update.
- *history*: a resume finds its line in metrics.jsonl by halving; the record at the end reads all lines.
- *time*: objects and resident memory over 2,000 updates.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.arguments import add_out, at_least
from benchmarks.overhead import say
from benchmarks.page import command_of
from xtrain import registry
from xtrain.contract import Engine, Job
from xtrain.data import Dataset, open_data
from xtrain.loop import WARMUP_STEPS, Loop
from xtrain.measure.machine import environment, resident_bytes
from xtrain.models.source import model_source
from xtrain.records.figures import StepFigures
from xtrain.records.metrics import MetricsLog, StepRecord, each_step
from xtrain.schedule import learning_rate
from xtrain.spec.tree import Spec

FAR_STEP = 1_000_000
SEQ_LEN = 64
DATA_BYTES = {"1 MB": 10**6, "100 MB": 10**8, "10 GB": 10**10}
HISTORY_LINES = (200, 20_000)
SAMPLES = 200
FIRST_STEPS = 200
"""Of the long run: after them nothing should grow."""


@dataclass(frozen=True)
class Row:
    """One size of one thing; None where it was not counted, or not timed."""

    part: str
    size: str
    what: str
    count: float | None
    seconds: float | None
    note: str = ""


class Unseen:
    """An observer that keeps nothing."""

    def saw(self, record: StepRecord) -> None:
        pass


SYNTHETIC = {"source": "synthetic", "tokens": 20_000}


def make_spec(micro: int = 4, **data: Any) -> Spec:
    return Spec.model_validate(
        {
            "model": {"preset": "gpt2-nano", "layers": 2, "hidden": 64, "heads": 2, "vocab_size": 257},
            "data": {"seq_len": SEQ_LEN, **(data or SYNTHETIC)},
            "batch": {"global": micro, "micro": micro},
            "train": {"steps": 2 * FAR_STEP},
            "optimizer": {"lr": 1e-4},
        }
    )


def start(spec: Spec) -> tuple[Engine, Dataset]:
    data = open_data(spec, show_progress=False)
    backend = registry.load("cpu")
    return backend.start(backend.resolve(spec, 1), model_source(spec, data.vocab_size), Job()), data


@contextmanager
def counted_calls() -> Iterator[list[int]]:
    """The number of calls of Python and C functions, in the one element."""
    calls = [0]

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            calls[0] += 1

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def median_seconds(action: Callable[[int], object], samples: int = SAMPLES) -> float:
    seconds = []
    for number in range(samples):
        started = perf_counter()
        action(number)
        seconds.append(perf_counter() - started)
    return statistics.median(seconds)


def whole_pass(model: torch.nn.Module, pair: tuple[torch.Tensor, torch.Tensor], number: int) -> None:
    model(*pair).backward()


def take_batch(data: Dataset, first: int, number: int) -> None:
    data.micro_batches(first + number, 0, 1)


def tokens() -> Iterator[Row]:
    for micro in (1, 2, 4, 8, 16):
        engine, data = start(make_spec(micro))
        model = engine.model  # type: ignore[attr-defined]
        (batch,) = data.micro_batches(0, 0, 1)
        pair = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
        with FlopCounterMode(display=False) as counter:
            model(*pair).backward()
        model.zero_grad()
        seconds = median_seconds(partial(whole_pass, model, pair), 20)
        engine.close()
        count = counter.get_total_flops() / (micro * SEQ_LEN)
        yield Row(
            "tokens",
            f"{micro * SEQ_LEN} tokens",
            "operations per token",
            count,
            seconds,
            "forward and backward",
        )


def batch_calls(data: Dataset, first: int, steps: int = SAMPLES) -> float:
    """Mean over `steps` steps from `first` on: a number outside the table is drawn again, now and then."""
    with counted_calls() as calls:
        for step in range(first, first + steps):
            data.micro_batches(step, 0, 1)
    return calls[0] / steps


def data_size(folder: Path) -> Iterator[Row]:
    for name, size in DATA_BYTES.items():
        path = folder / f"{size}.bin"
        path.touch()
        os.truncate(path, size)
        started = perf_counter()
        data = open_data(make_spec(source="tokens", path=str(path)), show_progress=False)
        opened = perf_counter() - started
        yield Row("data", name, "to open it", None, opened, "read once up to 1 GiB, then samples of it")
        for step in (0, FAR_STEP):
            seconds = median_seconds(partial(take_batch, data, step))
            yield Row("data", name, f"calls for the batch of step {step:,}", batch_calls(data, step), seconds)


def turn_calls(loop: Loop, first: int, turns: int) -> float:
    """Of the loop, with its updates, the first ones of a start left out."""
    loop.run(first, first + 8)
    with counted_calls() as calls:
        loop.run(first + 8, first + 8 + turns)
    return calls[0] / turns


def step_number() -> Iterator[Row]:
    spec = make_spec()
    engine, data = start(spec)
    for first in (0, FAR_STEP):
        loop = Loop(engine, data, learning_rate(spec), Unseen(), 10, audits=False)
        count = turn_calls(loop, first, 100)
        started = perf_counter()
        loop.run(first, first + 50)
        seconds = (perf_counter() - started) / 50
        yield Row("steps", f"from {first:,}", "calls for a turn of the loop", count, seconds)
    engine.close()


def history(folder: Path) -> Iterator[Row]:
    """By how long a metrics.jsonl makes a resume and a record take."""
    for lines in HISTORY_LINES:
        path = folder / f"{lines}.jsonl"
        log = MetricsLog(path)
        for step in range(1, lines + 1):
            log.append(StepRecord(step, 3.0, 1e-4, 1.0, 4 * SEQ_LEN, 0.01, False))
        with counted_calls() as calls:
            log.truncate_after(lines - 1)
        started = perf_counter()
        log.truncate_after(lines - 2)
        cut = perf_counter() - started
        started = perf_counter()
        StepFigures(each_step(path), 0, WARMUP_STEPS).speed.speed()
        read = perf_counter() - started
        size = f"{lines:,} lines"
        yield Row("history", size, "calls to resume: find the line of the checkpoint", calls[0], cut)
        yield Row("history", size, "to write the record: read them all", None, read, "linear")


def over_time(steps: int) -> Iterator[Row]:
    spec = make_spec()
    engine, data = start(spec)
    loop = Loop(engine, data, learning_rate(spec), Unseen(), 10)
    for first, last in ((0, FIRST_STEPS), (FIRST_STEPS, steps // 2), (steps // 2, steps)):
        started = perf_counter()
        loop.run(first, last)
        seconds = (perf_counter() - started) / (last - first)
        gc.collect()
        note = f"{resident_bytes().bytes / 2**20:.1f} MiB resident"
        yield Row("time", f"after {last:,} updates", "live objects", len(gc.get_objects()), seconds, note)
    engine.close()


def page(rows: list[Row], report: dict[str, Any]) -> str:
    cells = [
        [
            row.part,
            row.size,
            row.what,
            "-" if row.count is None else f"{row.count:,.1f}",
            "-" if row.seconds is None else f"{row.seconds * 1e3:,.3f}",
            row.note,
        ]
        for row in rows
    ]
    headers = ["", "size", "what", "count", "milliseconds", ""]
    machine = report["environment"]
    return "\n".join(
        [
            f"# What grows, {report['date']}",
            "",
            (__doc__ or "").partition("\n\n")[2],
            f"- Machine: {machine['cpu']}, {machine['platform']}; Python {machine['python']}, "
            f"torch {machine['packages']['torch']}; commit {machine['git_commit']}",
            f"- Command: `{report['command']}`",
            "",
            tabulate(cells, headers, tablefmt="github", disable_numparse=True),
            "",
        ]
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    fewest = at_least(2 * FIRST_STEPS + 2)
    parser.add_argument("--steps", type=fewest, default=2000, help="of the long run")
    add_out(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    date = datetime.now(UTC).date().isoformat()
    command = command_of("growth")
    report = {"date": date, "command": command, "environment": environment()}
    rows: list[Row] = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        parts = (tokens(), data_size(folder), step_number(), history(folder), over_time(arguments.steps))
        for part in parts:
            for row in part:
                rows.append(row)
                say(f"{row.part}, {row.size}: {row.what} {row.count or ''}")
    path = arguments.out / f"growth-{date}.json"
    path.write_text(json.dumps({**report, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(rows, report))
    say(f"written: {path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
