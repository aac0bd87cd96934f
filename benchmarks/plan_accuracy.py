"""Does `xtrain plan` predict what a step takes? `python -m benchmarks.plan_accuracy`.

Each case is a model, a shape of batch and a set of techniques, on the CPU. An engine takes two steps; the
second is taken under the ledger (xtrain/measure/ledger.py), which counts every live tensor by category.
Predicted and measured are the bytes of one process at the step's peak, each place by itself. Cases with
2 processes run DeepSpeed on gloo; "simulated" is an accelerator made for tests, whose tensors cannot be the
host's. fp16 is computed slowly where the processor has none: that changes the time, not the tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.arguments import add_out
from benchmarks.plan_cases import SIMULATED, Case, cases
from benchmarks.plan_measure import measure
from xtrain import registry
from xtrain.contract import MEMORY_CATEGORIES, ByPlace
from xtrain.launching.launch import start_workers
from xtrain.measure.machine import environment
from xtrain.plan.layout import HOST, Height, Layout, peaks
from xtrain.plan.step import Step, preset_step
from xtrain.spec.tree import Spec

EMULATED = "XTRAIN_EMULATED_FP16"
NEGLIGIBLE = 0.05
"""Of all that a case holds: places with less are not compared; nor, by themselves, categories of a place."""


@dataclass(frozen=True)
class Outcome:
    """One place of one case."""

    case: Case
    place: str
    predicted: Mapping[str, int]
    measured: Mapping[str, int]
    at: str
    """The moment that was predicted to be the peak."""

    @property
    def error(self) -> float:
        """Of the total; positive where too much was predicted."""
        return sum(self.predicted.values()) / self.total - 1

    @property
    def total(self) -> int:
        """Bytes measured."""
        return sum(self.measured.values())

    def difference(self, category: str) -> int:
        """Bytes, positive where too much was predicted."""
        return self.predicted.get(category, 0) - self.measured.get(category, 0)

    def category_error(self, category: str) -> float:
        """Of what was measured of it; never negative."""
        return abs(self.difference(category)) / max(1, self.measured.get(category, 0))

    def holds(self, category: str) -> bool:
        """Whether it is more than a negligible part of the place, as predicted or as measured."""
        return max(self.predicted.get(category, 0), self.measured.get(category, 0)) > NEGLIGIBLE * self.total


def predict(case: Case) -> Mapping[str, Height]:
    """By place, of one process."""
    with tempfile.TemporaryDirectory() as folder:
        spec = case.spec(Path(folder))
        step = _step(spec, case)
    return peaks(step, _layout(spec, case))


def _step(spec: Spec, case: Case) -> Step:
    if case.hf is None:
        return preset_step(spec, case.accumulation, on_host=case.backend != SIMULATED)
    from xtrain.plan.traced import Tracer

    return Step(spec, Tracer.of(spec)(spec), case.accumulation)


def _layout(spec: Spec, case: Case) -> Layout:
    simulated = case.backend == SIMULATED
    backend: Any = registry.load("cpu" if simulated else case.backend)
    layout: Layout | None = backend.layout(spec, case.world, "sim:0" if simulated else HOST)
    assert layout is not None, case
    return layout


def outcomes(case: Case, measured: ByPlace) -> Iterator[Outcome]:
    predicted = predict(case)
    total = sum(sum(held.values()) for held in measured.values())
    for place, held in measured.items():
        if sum(held.values()) > NEGLIGIBLE * total:
            height = predicted[place]
            yield Outcome(case, place, dict(height.bytes), held, height.name)


def measured(world: int, together: Sequence[Case]) -> Sequence[ByPlace]:
    """In this process, or in one job of several."""
    if world == 1:
        return [measure(case) for case in together]
    with tempfile.TemporaryDirectory() as name:
        described, result = Path(name) / "cases.json", Path(name) / "result.json"
        described.write_text(json.dumps([asdict(case) for case in together]))
        own = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        words = [str(described), str(result)]
        ended = start_workers(words, world, {**os.environ, **own}, "benchmarks.plan_measure")
        if ended.code:
            raise SystemExit(ended.message)
        found: list[ByPlace] = json.loads(result.read_text())
        return found


def sweep(wanted: Sequence[Case]) -> Iterator[Outcome]:
    by_world = sorted(wanted, key=lambda case: case.world)
    for world, group in groupby(by_world, key=lambda case: case.world):
        together = list(group)
        for case, found in zip(together, measured(world, together), strict=True):
            yield from outcomes(case, found)


def report(found: Sequence[Outcome], count: int) -> str:
    errors = [abs(outcome.error) for outcome in found]
    rows = [
        (
            str(one.case),
            one.place,
            f"{sum(one.predicted.values()) / 2**20:.2f}",
            f"{sum(one.measured.values()) / 2**20:.2f}",
            f"{one.error:+.1%}",
            one.at,
            *(f"{_megabytes(one.predicted, c)} / {_megabytes(one.measured, c)}" for c in MEMORY_CATEGORIES),
        )
        for one in found
    ]
    headers = ["case", "place", "predicted", "measured", "error", "peak at", *MEMORY_CATEGORIES]
    facts = environment()
    return "\n".join(
        [
            f"# Predicted against measured, {datetime.now(UTC):%Y-%m-%d}",
            "",
            __doc__.strip().split("\n\n", 1)[1] if __doc__ else "",
            "",
            f"- {count} cases, {len(errors)} places: median error {statistics.median(errors):.1%}, "
            f"worst {max(errors):.1%}",
            *(f"- {line}" for line in _by_lane(found)),
            *(f"- {line}" for line in _by_category(found)),
            f"- {facts['cpu']}, {facts['platform']}; Python {facts['python']}, packages {facts['packages']}",
            "- MiB at the peak; by category predicted / measured",
            "",
            tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True),
            "",
        ]
    )


def _by_lane(found: Sequence[Outcome]) -> Iterator[str]:
    for lane in dict.fromkeys(one.case.backend for one in found):
        errors = [abs(one.error) for one in found if one.case.backend == lane]
        yield f"{lane}: {len(errors)} places, median {statistics.median(errors):.1%}, worst {max(errors):.1%}"


def _by_category(found: Sequence[Outcome]) -> Iterator[str]:
    """Of the category itself where it is no negligible part of its place, and of the whole place."""
    for category in MEMORY_CATEGORIES:
        own = [one.category_error(category) for one in found if one.holds(category)]
        of_all = [abs(one.difference(category)) / one.total for one in found]
        if own:
            yield (
                f"{category}: {len(own)} places, median {statistics.median(own):.1%}, worst {max(own):.1%}; "
                f"of all that a place holds median {statistics.median(of_all):.1%}, worst {max(of_all):.1%}"
            )


def _megabytes(found: Mapping[str, int], category: str) -> str:
    return f"{found.get(category, 0) / 2**20:.2f}"


def parse_arguments() -> argparse.Namespace:
    """`cases` among them: those that are wanted."""
    known = list(cases())
    parser = argparse.ArgumentParser(description=__doc__)
    add_out(parser)
    lanes = sorted({case.backend for case in known})
    parser.add_argument("--lane", choices=lanes, help="only this backend's cases; writes nothing")
    parser.add_argument("--only", help="only cases that this text is in, such as fp16; writes nothing")
    found = parser.parse_args()
    found.cases = [
        case for case in known if found.lane in (None, case.backend) and (found.only or "") in str(case)
    ]
    if not found.cases:
        parser.error(f"argument --only: no case has {found.only!r} in it")
    return found


def main() -> None:
    arguments = parse_arguments()
    os.environ[EMULATED] = "1"
    wanted = arguments.cases
    found = []
    for one in sweep(wanted):
        found.append(one)
        print(f"{one.error:+7.2%}  {one.place:6}  {one.at:9}  {one.case}", flush=True)
    if arguments.lane or arguments.only:
        print(report(found, len(wanted)))
        return
    folder: Path = arguments.out
    name = f"plan-accuracy-{datetime.now(UTC):%Y-%m-%d}"
    (folder / f"{name}.md").write_text(report(found, len(wanted)))
    (folder / f"{name}.json").write_text(json.dumps([asdict(one) for one in found], indent=1))


if __name__ == "__main__":
    main()
