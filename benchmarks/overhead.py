"""What xtrain costs beside hand-written loops: `make bench`, or `python -m benchmarks.overhead --help`.

A case is an engine, a precision and a size. Its two programs train the same workload in fresh
processes that take turns, A B A B ... A: every B (xtrain) is set against the mean of the A before
and the A after it, so that a slow drift of the machine cancels, and every A against the A before
it, which shows how much of a difference is noise. Memory is counted in separate, shorter runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import time

import psutil

from benchmarks import workload
from benchmarks.arguments import add_out, at_least
from benchmarks.measured import STARTED, Measured
from benchmarks.overhead_report import CaseResult, evaluate, markdown
from benchmarks.page import command_of
from benchmarks.workload import SHARDING_BY_STAGE, SIZES, Precision, Workload
from xtrain.measure.machine import environment

ROOT = Path(__file__).parents[1]
ENGINES = ["cpu", *(f"deepspeed:{stage}" for stage in SHARDING_BY_STAGE)]
MEMORY_STEPS = 8
MEMORY_ROUNDS = 2
MMAP_THRESHOLD_BYTES = 131_072
"""Larger blocks go back to the system when freed: resident memory then follows what is in use."""


@dataclass(frozen=True)
class Case:
    """`engine` is "cpu", or "deepspeed:" and a ZeRO stage."""

    engine: str
    precision: Precision
    size: str

    @property
    def backend(self) -> str:
        return self.engine.partition(":")[0]

    @property
    def baseline(self) -> str:
        """The hand-written program."""
        return "plain_loop" if self.backend == "cpu" else "plain_deepspeed"

    @property
    def workload(self) -> Workload:
        stage = int(self.engine.partition(":")[2] or 0)
        return replace(SIZES[self.size], precision=self.precision, zero_stage=stage)


class Runner:
    """Starts measured programs on one workload, one at a time, each in a process of its own."""

    def __init__(self, backend: str, load: Workload, folder: Path, threads: int) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "DS_ACCELERATOR": "cpu",
            "BENCHMARK_BACKEND": backend,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # ninja
        }
        workload.write(folder, load)

    def run(self, program: str, imports: list[str] | None = None, **variables: str) -> Measured:
        result, log = self.folder / "result.json", self.folder / "log.txt"
        command = [sys.executable, "-m", f"benchmarks.{program}", str(self.folder), str(result)]
        if imports is not None:
            (self.folder / "imports.json").write_text(json.dumps(imports))
            command += ["--imports", str(self.folder / "imports.json")]
        environ = {**self.environment, **variables, STARTED: str(time())}
        with log.open("w") as output:
            done = subprocess.run(command, cwd=ROOT, env=environ, stdout=output, stderr=output)
        if done.returncode:
            sys.exit(f"error: {' '.join(command)} exited with {done.returncode}\n{log.read_text()[-4000:]}")
        return Measured(**json.loads(result.read_text()))


def measure_speed(case: Case, rounds: int, threads: int) -> tuple[list[Measured], list[Measured]]:
    """(A, B) with rounds + 1 and rounds runs."""
    with TemporaryDirectory() as folder:
        runner = Runner(case.backend, case.workload, Path(folder), threads)
        baseline, ours = [runner.run(case.baseline)], []
        for number in range(rounds):
            ours.append(runner.run("xtrain_run"))
            baseline.append(runner.run(case.baseline))
            say(f"  round {number + 1} of {rounds}")
        return baseline, ours


def measure_memory(case: Case, threads: int) -> tuple[list[Measured], list[Measured]]:
    """(A, B) in short runs that import beforehand what they imported in a run before."""
    load = replace(case.workload, steps=MEMORY_STEPS)
    with TemporaryDirectory() as folder:
        runner = Runner(case.backend, load, Path(folder), threads)

        def runs(program: str) -> list[Measured]:
            modules = runner.run(program).modules
            return [
                runner.run(program, modules, MALLOC_MMAP_THRESHOLD_=str(MMAP_THRESHOLD_BYTES))
                for _ in range(MEMORY_ROUNDS)
            ]

        return runs(case.baseline), runs("xtrain_run")


def measure(cases: list[Case], rounds: int, threads: int) -> Iterator[CaseResult]:
    for case in cases:
        say(f"{case.engine}, {case.precision}, {case.size}")
        speed = measure_speed(case, rounds, threads)
        memory = measure_memory(case, threads)
        result = evaluate(case.engine, case.precision, case.size, case.workload, speed, memory)
        say(f"  {result.sentence()}")
        yield result


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parse_arguments(program: str, **defaults: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--engines", nargs="+", default=["cpu", "deepspeed:0", "deepspeed:2", "deepspeed:3"], choices=ENGINES
    )
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=at_least(1), default=5, help="xtrain runs per case")
    parser.add_argument("--threads", type=at_least(1), default=psutil.cpu_count(logical=False) or 1)
    add_out(parser)
    parser.set_defaults(**defaults)
    return parser.parse_args()


def main(program: str = "overhead", **defaults: object) -> int:
    """Measure, and write PROGRAM-DATE.json and .md; `defaults` are for the command line's options."""
    arguments = parse_arguments(program, **defaults)
    cases = [
        Case(engine, precision, size)
        for engine in arguments.engines
        for precision in arguments.precisions
        for size in arguments.sizes
    ]
    date = datetime.now(UTC).date().isoformat()
    command = command_of(program)
    header = {"date": date, "command": command, "threads": arguments.threads, "rounds": arguments.rounds}
    results: list[CaseResult] = []
    for result in measure(cases, arguments.rounds, arguments.threads):
        results.append(result)  # written case by case: a run that is broken off leaves what it has
        report = {**header, "environment": environment(), "cases": [r.as_json() for r in results]}
        path = arguments.out / f"{program}-{date}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report, results))
    say(f"written: {path} and {path.with_suffix('.md').name}")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
