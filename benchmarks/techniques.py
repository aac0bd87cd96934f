"""What each memory technique saves and costs: `python -m benchmarks.techniques --help`.

Memory: short runs of each lane in fresh processes, all on the same model and batches. Time: a lane
with the technique and the same lane without it take turns, as in overhead.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.arguments import add_out, at_least
from benchmarks.overhead import MMAP_THRESHOLD_BYTES, Runner, say
from benchmarks.page import command_of
from benchmarks.techniques_report import MemoryResult, SpeedResult, evaluate_memory, evaluate_speed, markdown
from benchmarks.workload import Workload
from xtrain import registry
from xtrain.measure.machine import environment
from xtrain.spec.tree import Spec

Settings = dict[str, Any]

MODEL = Workload(
    layers=6,
    hidden=384,
    heads=6,
    context=512,
    global_batch=8,
    micro_batch=8,
    steps=2,
    vocab_size=8192,
    positions=512,
    warmup=1,
)
"""14 million parameters."""
SHORTER = replace(MODEL, context=256, global_batch=4, micro_batch=4, steps=14)
"""For times: the same model, with steps of about a second."""
TINY = replace(MODEL, layers=1, hidden=32, heads=1, context=32)
"""To learn what a program imports."""

PLAIN: Settings = {"memory.loss_chunk": "none"}
EVERY_BLOCK = {"every": 1}


@dataclass(frozen=True)
class Lane:
    """A way to train the model, for its memory."""

    name: str
    settings: Settings | None = None
    """What xtrain's spec changes; None: Hugging Face's model in a plain loop."""
    variables: dict[str, str] = field(default_factory=dict)

    def run_by(self, runner: Runner, imports: list[str] | None = None, **variables: str) -> Any:
        program = "hugging_face_loop" if self.settings is None else "xtrain_run"
        settings = {"BENCHMARK_SETTINGS": json.dumps(self.settings or {})}
        return runner.run(program, imports, **self.variables, **settings, **variables)


HUGGING_FACE = Lane("Hugging Face GPT-2, plain loop")
BUILT_IN = Lane("xtrain, nothing on", PLAIN)
BOTH = Lane("checkpointing (every: 1) and chunked loss", {"memory.checkpointing": EVERY_BLOCK})
LANES = [
    HUGGING_FACE,
    Lane("Hugging Face GPT-2, its own checkpointing", variables={"BENCHMARK_CHECKPOINTING": "1"}),
    BUILT_IN,
    Lane("chunked loss", {}),
    Lane("checkpointing (every: 1)", {**PLAIN, "memory.checkpointing": EVERY_BLOCK}),
    Lane("checkpointing (auto)", {**PLAIN, "memory.checkpointing": "auto"}),
    Lane("checkpointing (ops: cheap)", {**PLAIN, "memory.checkpointing": {"selective": {"ops": "cheap"}}}),
    BOTH,
]
BARS = {HUGGING_FACE.name: 0.36, BUILT_IN.name: 0.47}
"""Most that BOTH may take of each."""


@dataclass(frozen=True)
class Technique:
    """Two lanes, without and with it, for the time of a step."""

    name: str
    without: Settings
    settings: Settings
    bar: float | None
    """Most time a step may take, as a multiple; None where none was set."""


TECHNIQUES = [
    Technique("checkpointing (every: 1)", {}, {"memory.checkpointing": EVERY_BLOCK}, 1.35),
    Technique("checkpointing (auto)", {}, {"memory.checkpointing": "auto"}, 1.35),
    Technique(
        "checkpointing (ops: cheap)", {}, {"memory.checkpointing": {"selective": {"ops": "cheap"}}}, None
    ),
    Technique("chunked loss", PLAIN, {}, 1.05),
    Technique("gradient offload", {}, {"memory.offload.gradients": "cpu"}, 1.05),
]


def measure_memory(lanes: Sequence[Lane], repeats: int, threads: int) -> Iterator[MemoryResult]:
    """Each lane in processes that import beforehand what they will import."""
    with TemporaryDirectory() as small, TemporaryDirectory() as folder:
        tiny, runner = Runner("cpu", TINY, Path(small), threads), Runner("cpu", MODEL, Path(folder), threads)
        for lane in lanes:
            modules = lane.run_by(tiny).modules
            runs = [
                lane.run_by(runner, modules, MALLOC_MMAP_THRESHOLD_=str(MMAP_THRESHOLD_BYTES))
                for _ in range(repeats)
            ]
            result = evaluate_memory(lane.name, runs)
            say(f"  {lane.name}: grew by {result.growth_bytes / 2**20:.0f} MiB")
            yield result


def measure_speed(technique: Technique, rounds: int, threads: int) -> SpeedResult:
    """A B A B ... A: `rounds` runs with the technique between one more without it."""
    with TemporaryDirectory() as folder:
        runner = Runner("cpu", SHORTER, Path(folder), threads)
        without, using = Lane("without", technique.without), Lane("with", technique.settings)
        before, after = [without.run_by(runner)], []
        for number in range(rounds):
            after.append(using.run_by(runner))
            before.append(without.run_by(runner))
            say(f"  {technique.name}: round {number + 1} of {rounds}")
        return evaluate_speed(technique.name, technique.bar, SHORTER, before, after)


def refused(technique: Technique) -> bool:
    """Whether the backend cannot do it (yet)."""
    section: dict[str, Any] = {}
    for key, value in technique.settings.items():
        *path, name = key.split(".")[1:]
        inner = section
        for part in path:
            inner = inner.setdefault(part, {})
        inner[name] = value
    spec = Spec.model_validate({**SHORTER.spec(), "memory": section})
    return bool(registry.load("cpu").problems(spec, 1))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", choices=["memory", "speed"], help="leave the other out")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="runs of each lane, for its memory")
    parser.add_argument(
        "--rounds", type=at_least(1), default=5, help="runs with each technique, for its time"
    )
    parser.add_argument("--threads", type=at_least(1), default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--remark", default="", help="a sentence for the page, such as how busy it was")
    add_out(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    date = datetime.now(UTC).date().isoformat()
    report: dict[str, Any] = {
        "date": date,
        "command": command_of("techniques"),
        "threads": arguments.threads,
        "repeats": arguments.repeats,
        "rounds": arguments.rounds,
        "remark": arguments.remark,
        "environment": environment(),
    }
    memory: list[MemoryResult] = []
    speed: list[SpeedResult] = []
    path = arguments.out / f"techniques-{date}.json"

    def write() -> None:  # after every result: a run that is broken off leaves what it has
        results = {"memory": [r.as_json() for r in memory], "speed": [r.as_json() for r in speed]}
        path.write_text(json.dumps({**report, **results}, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report, memory, speed, BOTH.name, BARS))

    if arguments.only != "speed":
        for result in measure_memory(LANES, arguments.repeats, arguments.threads):
            memory.append(result)
            write()
    if arguments.only != "memory":
        for technique in TECHNIQUES:
            if refused(technique):
                say(f"  {technique.name}: not built for this backend, left out")
            else:
                speed.append(measure_speed(technique, arguments.rounds, arguments.threads))
                write()
    say(f"written: {path} and {path.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
