"""What `make gpu` is made of: lanes, each in a process of its own, that end as a row whatever happens."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

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

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def call(self, command: list[str], limit_seconds: float) -> Ended:
        """Run it with everything it starts, and end all of that when its time is over."""
        left = self.ends_at - perf_counter()
        if left < SHORTEST_SECONDS:
            return Ended("", "left out: the time up to here was used up", 0.0)
        started = perf_counter()
        with subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=min(limit_seconds, left))
                problem = _last_words(output) if process.returncode else ""
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                problem = f"not done within {min(limit_seconds, left):.0f} s"
        return Ended(output, problem, perf_counter() - started)

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
        stem = f"{part}-{name}".replace(" ", "-").replace("/", "-")
        path, out = self.folder / f"{stem}.yaml", self.folder / stem
        section = {"log": {"every_steps": 1 if "every_steps" not in changes else changes.pop("every_steps")}}
        tree = {**load.spec(), **section, **changes}
        path.write_text(yaml.safe_dump(tree))
        command = ["-m", "xtrain", "run", str(path), "--backend", backend or self.device, "--out", str(out)]
        return self.row(
            part, name, command, limit_seconds, lambda output: self._figures(load_record(out), tree)
        )

    def plain(self, part: str, name: str, load: Workload, limit_seconds: float, compiled: bool) -> Row:
        settings, result = self.folder / "settings.json", self.folder / "result.json"
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


def _last_words(output: str) -> str:
    """The error's message, on one line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [place for place, line in enumerate(lines) if line.startswith("error:")]
    said = lines[errors[-1] :] if errors else lines[-1:]
    return " ".join(said)[:400] or "failed without a word"
