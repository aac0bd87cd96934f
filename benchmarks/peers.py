"""xtrain beside the ways in which people train otherwise: `make peers`; `python -m benchmarks.peers --help`.

Every lane trains the same model on the same sequences in the same order with the same optimizer, schedule and
precision, in fresh processes that take turns. A round is: the plain loop, two lanes, the plain loop, two
lanes, ... the plain loop. A lane's run is set against the plain runs before and after it, and every plain
run against the plain run before it (A/A): the noise of the machine. Growth of memory is counted in shorter
runs of their own (`--memory`), in which everything was imported beforehand.

It runs in an environment of its own, with the peers in it: .venv-peers, which `make peers` makes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.arguments import FEWEST_STEPS, add_out, at_least
from benchmarks.measured import Measured
from benchmarks.overhead import MMAP_THRESHOLD_BYTES, Runner, say
from benchmarks.page import command_of
from benchmarks.peers_report import Case, LaneRuns, markdown
from benchmarks.workload import HF_FOLDER, SIZES, Workload
from xtrain.allocator import MMAP_THRESHOLD_BYTES as MMAP_THRESHOLD_KEPT_BYTES
from xtrain.allocator import TRIM_THRESHOLD_BYTES
from xtrain.measure.machine import environment, package_version

PACKAGES = ("torch", "transformers", "accelerate", "lightning", "deepspeed", "xtrain")
STEPS = {"micro": 120, "small": 16}
MEMORY_STEPS = 4
LARGE_VOCABULARY = 50_257


@dataclass(frozen=True)
class Lane:
    """A program, and which model it trains: Hugging Face's (`hf`) or xtrain's (`own`)."""

    name: str
    program: str
    model: str = "hf"
    variables: Mapping[str, str] = field(default_factory=dict)

    def run_by(self, runner: Runner, imports: list[str] | None = None, **variables: str) -> Measured:
        settings: dict[str, Any] = {}
        if self.program == "xtrain_run" and self.model == "hf":
            settings = {"model": {"hf": str(runner.folder / HF_FOLDER)}}
        own = {"BENCHMARK_MODEL": self.model, "BENCHMARK_SETTINGS": json.dumps(settings)}
        return runner.run(self.program, imports, **own, **self.variables, **variables)


def peer(name: str, program: str, model: str = "hf", **variables: str) -> Lane:
    return Lane(name, f"peer_programs.{program}", model, variables)


def xtrain(name: str, backend: str, model: str = "hf") -> Lane:
    return Lane(name, "xtrain_run", model, {"BENCHMARK_BACKEND": backend})


PLAIN = peer("plain loop", "plain")
TUNED = {
    "BENCHMARK_ACTIVATION": "gelu_pytorch_tanh",
    "MALLOC_MMAP_THRESHOLD_": str(MMAP_THRESHOLD_KEPT_BYTES),
    "MALLOC_TRIM_THRESHOLD_": str(TRIM_THRESHOLD_BYTES),
}
"""What somebody who has measured would set for the plain loop: the GELU in one kernel, freed memory kept.
xtrain does both by itself."""
LANES = [
    xtrain("xtrain cpu", "cpu"),
    peer("plain loop, tuned", "plain", **TUNED),
    peer("Accelerate", "accelerate_loop"),
    peer("HF Trainer", "hf_trainer"),
    peer("Lightning Fabric", "fabric_loop"),
    peer("Lightning Trainer", "lightning_trainer"),
    peer("DeepSpeed", "raw_deepspeed"),
    xtrain("xtrain deepspeed", "deepspeed"),
    peer("DeepSpeed ZeRO-2", "raw_deepspeed", BENCHMARK_ZERO_STAGE="2"),
    xtrain("xtrain cpu, built-in model", "cpu", "own"),
    peer("plain loop, built-in model", "plain", "own"),
]
NAMES = [PLAIN.name, *(lane.name for lane in LANES)]
BETWEEN_PLAIN_RUNS = 2


def turns(lanes: Sequence[Lane], rounds: int) -> list[Lane]:
    """All runs in order: it begins and ends with the plain loop."""
    order = [PLAIN]
    for _ in range(rounds):
        for start in range(0, len(lanes), BETWEEN_PLAIN_RUNS):
            order += [*lanes[start : start + BETWEEN_PLAIN_RUNS], PLAIN]
    return order


def measure_speed(load: Workload, lanes: Sequence[Lane], rounds: int, threads: int) -> LaneRuns:
    """(lane, run) in the order they were made."""
    runs: LaneRuns = []
    with TemporaryDirectory() as folder:
        runner = Runner("cpu", load, Path(folder), threads)
        order = turns(lanes, rounds)
        for number, lane in enumerate(order, start=1):
            run = lane.run_by(runner)
            runs.append((lane.name, run))
            rate = load.tokens_per_step * (load.steps - 1) / sum(run.step_seconds[1:])
            say(f"  {number} of {len(order)}: {lane.name}, {rate:,.0f} tokens/s")
    return runs


def measure_memory(load: Workload, lanes: Sequence[Lane], threads: int) -> dict[str, int]:
    """By how many bytes the resident set grew at most, above the imports."""
    grown: dict[str, int] = {}
    with TemporaryDirectory() as folder:
        runner = Runner("cpu", replace(load, steps=MEMORY_STEPS, warmup=1), Path(folder), threads)
        for lane in (PLAIN, *lanes):
            modules = lane.run_by(runner).modules
            run = lane.run_by(runner, modules, MALLOC_MMAP_THRESHOLD_=str(MMAP_THRESHOLD_BYTES))
            grown[lane.name] = run.growth_bytes
            say(f"  {lane.name}: grew by {run.growth_bytes / 2**20:,.0f} MiB")
    return grown


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--precisions", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument(
        "--lanes", nargs="+", default=NAMES, choices=NAMES, metavar="LANE", help=f"of {NAMES}"
    )
    parser.add_argument("--rounds", type=at_least(1), default=1)
    parser.add_argument("--steps", type=at_least(FEWEST_STEPS), help="of each run; otherwise by size")
    parser.add_argument("--memory", action="store_true", help="count the growth of memory too")
    parser.add_argument("--large-vocabulary", action="store_true", help=f"{LARGE_VOCABULARY} symbols")
    parser.add_argument("--no-speed", action="store_true", help="only what --memory asks for")
    parser.add_argument("--threads", type=at_least(1), default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--remark", default="", help="a sentence for the page, such as how busy it was")
    add_out(parser)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, precision: Any, size: str) -> Case:
    lanes = [lane for lane in LANES if lane.name in arguments.lanes]
    steps = arguments.steps or STEPS[size]
    load = replace(SIZES[size], precision=precision, steps=steps)
    if arguments.large_vocabulary:
        load = replace(load, vocab_size=LARGE_VOCABULARY)
    runs: LaneRuns = []
    if not arguments.no_speed:
        runs = measure_speed(load, lanes, arguments.rounds, arguments.threads)
    grown = measure_memory(load, lanes, arguments.threads) if arguments.memory else {}
    return Case.of(size, load, PLAIN.name, runs, grown)


def main() -> int:
    arguments = parse_arguments()
    missing = [name for name in PACKAGES if package_version(name) is None]
    if missing:
        print(f"error: not installed here: {', '.join(missing)}; run it by `make peers`", file=sys.stderr)
        return 2
    date = datetime.now(UTC).date().isoformat()
    name = "-".join(["peers", date, *arguments.precisions])
    path = arguments.out / f"{name}{'-large-vocabulary' * arguments.large_vocabulary}.json"
    facts = environment() | {"packages": {name: package_version(name) for name in PACKAGES}}
    header = {
        "date": date,
        "command": command_of("peers"),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "remark": arguments.remark,
        "environment": facts,
    }
    cases: list[Case] = []
    for precision in arguments.precisions:
        for size in arguments.sizes:
            say(f"{size}, {precision}")
            cases.append(measure(arguments, precision, size))
            found = {**header, "cases": [case.as_json() for case in cases]}
            path.write_text(json.dumps(found, indent=1) + "\n")
            path.with_suffix(".md").write_text(markdown(header, cases))
    say(f"written: {path} and {path.with_suffix('.md').name}")
    return 0 if not any(case.missed for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
