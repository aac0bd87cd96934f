"""Does `xtrain compare` call a lane slower that is, and only that? `python -m benchmarks.planted_slowness`.

First runs without and with many extra products in the model (benchmarks/planted_model.py) tell what one of
them takes, and so how many are 10% of a step. Then a real comparison of three lanes, in fresh processes that
take turns: the same spec twice, and once with those products. Kept are the speed of each run, the verdict's
own words, and every pair's difference beside its noise.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from tabulate import tabulate

from benchmarks.arguments import FEWEST_STEPS, add_out, at_least
from benchmarks.page import command_of, head
from xtrain.compare import compare
from xtrain.lanes import Lane
from xtrain.measure.machine import environment
from xtrain.report.comparison import Comparison
from xtrain.report.verdicts import speed_difference

SPEC: dict[str, Any] = {
    "model": {"factory": "benchmarks.planted_model:build"},
    "data": {"source": "synthetic", "seq_len": 128, "tokens": 200_000},
    "batch": {"global": 4},
    "optimizer": {"lr": 1e-3},
}
SLOWER = 0.10
"""Of a step's time, as the products are planned to add."""
PROBE = 200
"""Extra products of the run that tells what one of them takes."""
BACKEND = "cpu"
PLAIN, SAME, SLOWED = (f"{BACKEND} {label}" for label in ("plain", "the same", "slowed"))


@dataclass(frozen=True)
class Pair:
    """Two lanes as the verdict sees them."""

    first: str
    second: str
    difference: float
    """Speed of the first over that of the second, less 1."""
    noise: float
    is_noise: bool

    @property
    def is_right(self) -> bool:
        """A planted lane differs from each other one; lanes of one spec do not."""
        return self.is_noise != (SLOWED in (self.first, self.second))


def extra_products(plain_seconds: float, probe_seconds: float, share: float = SLOWER) -> int:
    """How many make a step `share` longer, where PROBE of them made it take `probe_seconds`; at least 1."""
    each = (probe_seconds - plain_seconds) / PROBE
    if each <= 0:
        raise SystemExit("the probe was no slower than the plain run: the machine is too busy to measure")
    return max(1, round(share * plain_seconds / each))


def pairs(comparison: Comparison) -> Iterator[Pair]:
    timed = comparison.finished
    for (name, figures), (other, others) in combinations(timed, 2):
        found = speed_difference(figures, others, len(timed))
        yield Pair(name, other, found.ratio - 1, found.noise, found.is_noise)


def lane(name: str, extra: int) -> Lane:
    label = name.removeprefix(BACKEND).strip()
    return Lane(BACKEND, overrides=(f"model.args={{extra: {extra}}}",), label=label)


def compared(folder: Path, lanes: Sequence[Lane], steps: int, repeats: int) -> Comparison:
    """In fresh processes, by what `xtrain compare` itself runs."""
    folder.mkdir()
    spec = folder / "planted.yaml"
    spec.write_text(yaml.safe_dump({**SPEC, "train": {"steps": steps}}))
    found = compare(spec, lanes, folder / "out", repeats=repeats)
    for one in found.unfinished:
        raise SystemExit(f"{one.name}: {one.reason}")
    return found


def step_seconds(comparison: Comparison) -> dict[str, float]:
    """By lane, of its fastest repeat: what else the machine does only makes a step longer."""
    tokens = SPEC["batch"]["global"] * SPEC["data"]["seq_len"]
    return {name: tokens / max(figures.repeat_rates) for name, figures in comparison.finished}


def measure(steps: int, repeats: int) -> dict[str, Any]:
    with TemporaryDirectory() as name:
        probe = compared(Path(name) / "probe", [lane(PLAIN, 0), lane(SLOWED, PROBE)], steps, repeats)
        seconds = step_seconds(probe)
        extra = extra_products(seconds[PLAIN], seconds[SLOWED])
        lanes = [lane(PLAIN, 0), lane(SAME, 0), lane(SLOWED, extra)]
        comparison = compared(Path(name) / "lanes", lanes, steps, repeats)
    (speed,) = (one for one in comparison.verdicts if one.topic == "speed")
    found = [*pairs(comparison)]
    return {
        "threads": comparison.finished[0][1].threads,
        "extra_products": extra,
        "added_seconds": extra * (seconds[SLOWED] - seconds[PLAIN]) / PROBE,
        "rates": {name: figures.repeat_rates for name, figures in comparison.finished},
        "pairs": [{**vars(pair), "is_right": pair.is_right} for pair in found],
        "verdict": [speed.headline, *speed.details],
        "step_seconds": step_seconds(comparison),
    }


def page(report: dict[str, Any]) -> str:
    method = (__doc__ or "").split("\n\n", 1)[1]
    added = report["added_seconds"] / report["step_seconds"][PLAIN]
    rates = [[name, ", ".join(f"{rate:,.0f}" for rate in found)] for name, found in report["rates"].items()]
    rows = [
        [
            f"{one['first']} and {one['second']}",
            f"{one['difference']:+.1%}",
            f"{one['noise']:.1%}",
            "within noise" if one["is_noise"] else "beyond noise",
            "right" if one["is_right"] else "wrong",
        ]
        for one in report["pairs"]
    ]
    lines = [
        *head("A lane that really is slower", method, report),
        f"- Added: {report['extra_products']} products, {1000 * report['added_seconds']:.2f} ms, to a plain "
        f"step's {1000 * report['step_seconds'][PLAIN]:.1f} ms ({added:.1%}), each by the fastest repeat",
        "",
        tabulate(rates, ["lane", "tokens/s of each repeat"], tablefmt="github", disable_numparse=True),
        "",
        tabulate(rows, ["lanes", "apart", "noise", "said", ""], tablefmt="github", disable_numparse=True),
        "",
        "The verdict's words:",
        "",
        *(f"- {line}" for line in report["verdict"]),
    ]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=at_least(FEWEST_STEPS), default=200)
    parser.add_argument("--repeats", type=at_least(1), default=5)
    add_out(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    report = {
        "date": day,
        "command": command_of("planted_slowness"),
        "environment": environment(),
        **measure(arguments.steps, arguments.repeats),
    }
    stem = arguments.out / f"planted-slowness-{day}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    stem.with_suffix(".md").write_text(page(report))
    print(page(report))


if __name__ == "__main__":
    main()
