"""What `make gpu` is made of: lanes, each in a process of its own, that end as a row whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

import yaml

from benchmarks.overhead import ROOT
from benchmarks.workload import Workload
from xtrain.measure.flops import flops_per_token
from xtrain.models.presets import dimensions
from xtrain.records.record import RunRecord, load_record, prediction
from xtrain.spec.tree import Spec

DENSE_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Operations per second of the data sheets, without sparsity, by a part of the GPU's name."""
SHORTEST_SECONDS = 10.0
"""With less time left a lane is not begun."""
LAST_WORDS_SECONDS = 3.0
"""For a process whose time is over to tell where it stands."""
SURROUNDINGS = {
    "PYTHONWARNINGS": "ignore",
    "PYTHONUNBUFFERED": "1",  # what was printed is there when the time is over
    "PYTHONFAULTHANDLER": "1",
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever else the machine has installed
}
ERROR = re.compile(r"(\[rank\d+\]: )?(error: |[\w.]*(Error|Exception)(:|$))")
"""How the line begins that names what a process ended with."""

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What became of one lane; `outcome` is "done" or why it has no figures."""

    part: str
    name: str
    outcome: str
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """A process that ran; `problem` is empty where it ended well."""

    output: str
    problem: str
    seconds: float


@dataclass(frozen=True)
class Bench:
    """Where lanes run, and until when."""

    device: str
    """`cuda`; `cpu` to try the programs out, with tiny sizes."""
    gpu_name: str
    folder: Path
    ends_at: float
    """By perf_counter."""
    log: Path
    """Has the commands of all lanes and what they print: all there is to mend them by from afar."""

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def call(self, command: list[str], limit_seconds: float) -> Ended:
        """Run it with everything it starts, and end all of that when its time is over.

        What it prints goes to the log at once: it is there too when somebody ends this program.
        """
        left = self.ends_at - perf_counter()
        if left < SHORTEST_SECONDS:
            return Ended("", "left out: the time up to here was used up", 0.0)
        started, limit = perf_counter(), min(limit_seconds, left)
        with self.log.open("a+", errors="replace") as log:
            print("===", *command, file=log, flush=True)
            begins = log.tell()
            code = _run(command, log, limit)
            log.seek(begins)
            output, seconds = log.read(), perf_counter() - started
            problem = "" if code == 0 else _last_words(output)
            if code is None:
                problem = f"not done within {limit:.0f} s"
            print(f"=== {problem or 'done'}, after {seconds:.1f} s\n", file=log)
        return Ended(output, problem, seconds)

    def row(
        self, part: str, name: str, command: list[str], limit_seconds: float, read: Callable[[str], Figures]
    ) -> Row:
        """A command as a row; `read` makes figures of its output, and may fail like it."""
        ended = self.call(command, limit_seconds)
        figures: Figures = {"process_seconds": ended.seconds}
        if ended.problem:
            return Row(part, name, ended.problem, figures)
        try:
            return Row(part, name, "done", {**read(ended.output), **figures})
        except Exception as error:  # whatever it left behind: the other lanes go on
            reason = f"what it left cannot be read: {type(error).__name__}: {error}"
            return Row(part, name, reason.splitlines()[0], figures)

    def xtrain(
        self, part: str, name: str, load: Workload, limit_seconds: float, backend: str = "", **changes: Any
    ) -> Row:
        """`xtrain run` on a workload; `changes` replace sections of its spec."""
        section = {"log": {"every_steps": 1 if "every_steps" not in changes else changes.pop("every_steps")}}
        tree, out = {**load.spec(), **section, **changes}, self.folder / _stem(part, name)
        command = ["-m", "benchmarks.gpu_run", *self._run(tree, backend or self.device, out)]
        return self.row(
            part, name, command, limit_seconds, lambda output: self._figures(load_record(out), tree)
        )

    def profile(self, part: str, name: str, load: Workload, limit_seconds: float, **changes: Any) -> Row:
        """The same on the device, with torch's profiler around some of its steps."""
        tree, out = {**load.spec(), **changes}, self.folder / _stem(part, name)
        command = ["-m", "benchmarks.gpu_profile", *self._run(tree, self.device, out)]
        return self.row(part, name, command, limit_seconds, lambda output: json.loads(last_line(output)))

    def _run(self, tree: Mapping[str, Any], backend: str, out: Path) -> list[str]:
        """What xtrain is called with; the spec lies beside `out`."""
        path = out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(dict(tree)))
        return ["run", str(path), "--backend", backend, "--out", str(out)]

    def plain(self, part: str, name: str, load: Workload, limit_seconds: float, compiled: bool) -> Row:
        settings = self.folder / f"{_stem(part, name)}.json"
        result = settings.with_suffix(".result")
        settings.write_text(
            json.dumps({"workload": asdict(load), "device": self.device, "compile": compiled})
        )
        command = ["-m", "benchmarks.gpu_plain", str(settings), str(result)]
        return self.row(part, name, command, limit_seconds, lambda output: self._plain_figures(load, result))

    def _plain_figures(self, load: Workload, result: Path) -> Figures:
        found = json.loads(result.read_text())
        spec = Spec.model_validate(load.spec())
        size = dimensions(spec)
        return {
            "tokens_per_second": found["tokens_per_second"],
            "mfu": self.mfu(_parameters(load), size.layers, size.hidden, load, found["tokens_per_second"]),
            "peak_bytes": found["peak_bytes"],
            "loss_first": found["losses"][0],
            "loss_last": found["losses"][-1],
        }

    def _figures(self, record: RunRecord, tree: Mapping[str, Any]) -> Figures:
        spec = Spec.model_validate(tree)
        size, memory = dimensions(spec), record.memory[0]
        rate = record.speed.tokens_per_second if record.speed else None
        load_like = spec.data.seq_len
        flops = flops_per_token(record.model.parameters, size.layers, size.hidden, load_like)
        peak = memory.live.peak_bytes if memory.live else None
        return {
            "tokens_per_second": rate,
            "mfu": self._share_of_peak(flops * rate) if rate and spec.precision.dtype != "fp32" else None,
            "peak_bytes": peak,
            "planned_bytes": planned_bytes(record, self.device),
            "loss_first": record.loss.first,
            "loss_last": record.loss.last,
        }

    def mfu(self, parameters: int, layers: int, hidden: int, load: Workload, rate: float) -> float | None:
        if load.precision == "fp32":
            return None
        return self._share_of_peak(flops_per_token(parameters, layers, hidden, load.context) * rate)

    def _share_of_peak(self, flops_per_second: float) -> float | None:
        """None for a device whose data sheet is not in the table."""
        peak = next((flops for part, flops in DENSE_BF16_FLOPS.items() if part in self.gpu_name), None)
        return flops_per_second / peak if peak else None


def planned_bytes(record: RunRecord, device: str) -> int | None:
    """What the planner said of a step on the device; None where it said nothing."""
    predicted = prediction(record)
    if predicted is None or predicted.peak_bytes is None:
        return None
    sums = {place: sum(held.values()) for place, held in predicted.peak_bytes.items()}
    return max((held for place, held in sums.items() if place.startswith(device)), default=None)


def _parameters(load: Workload) -> int:
    block = 12 * load.hidden**2 + 13 * load.hidden
    return load.layers * block + (load.vocab_size + load.positions + 2) * load.hidden


def _stem(part: str, name: str) -> str:
    """For files of a lane, readable where the log names them."""
    return re.sub(r"[^\w+-]+", "-", f"{part}-{name}")


def _run(command: list[str], log: TextIO, limit_seconds: float) -> int | None:
    """Its exit code; None where its time was over, and then the log has where each of its threads stood."""
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, **SURROUNDINGS},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        code = None
        try:
            code = process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS_SECONDS)
        with suppress(ProcessLookupError):  # what it has started
            os.killpg(process.pid, signal.SIGKILL)
    return code


def last_line(output: str) -> str:
    return output.rstrip().rpartition("\n")[2]


def _last_words(output: str) -> str:
    """The error's message, on one line."""
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    errors = [place for place, line in enumerate(lines) if ERROR.match(line)]
    said = lines[errors[-1] :] if errors else lines[-1:]
    return " ".join(line.strip() for line in said)[:400] or "failed without a word"
