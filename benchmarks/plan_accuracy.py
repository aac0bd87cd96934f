"""Does `xtrain plan` predict what a step takes? `python -m benchmarks.plan_accuracy`.

Each case is a model, a shape of batch and a set of techniques. One engine takes two steps in this process
on the CPU; the second is taken under the ledger (xtrain/ledger.py), which counts every live tensor by
category. Predicted and measured are then the bytes at the step's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

from xtrain import registry
from xtrain.contract import MEMORY_CATEGORIES, Job, StepInput
from xtrain.data import open_data
from xtrain.ledger import Ledger
from xtrain.machine import environment
from xtrain.models.presets import dimensions
from xtrain.models.source import model_source
from xtrain.plan.step import Step
from xtrain.spec.tree import Spec
from xtrain.trace import NullTrace

RESULTS = Path(__file__).parent / "results"
BF16_WEIGHTS = {"dtype": "bf16", "weights": "bf16"}


@dataclass(frozen=True)
class Case:
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    seq_len: int = 128
    micro: int = 4
    accumulation: int = 2
    vocab_size: int = 257
    precision: Any = "fp32"
    checkpointing: Any = "none"
    loss_chunk: Any = "auto"

    def spec(self) -> Spec:
        return Spec.model_validate(
            {
                "model": {
                    "preset": "gpt2-nano",
                    "layers": self.layers,
                    "hidden": self.hidden,
                    "heads": self.heads,
                    "vocab_size": self.vocab_size,
                },
                "data": {"source": "synthetic", "seq_len": self.seq_len, "tokens": 200_000},
                "batch": {"global": self.micro * self.accumulation, "micro": self.micro},
                "train": {"steps": 4},
                "optimizer": {"name": "adamw", "lr": 1e-3},
                "precision": self.precision,
                "memory": {"checkpointing": self.checkpointing, "loss_chunk": self.loss_chunk},
            }
        )


@dataclass(frozen=True)
class Outcome:
    case: Case
    predicted: Mapping[str, int]
    measured: Mapping[str, int]
    at: str
    """The height that was predicted to be the peak."""

    @property
    def error(self) -> float:
        """Of the total; positive where too much was predicted."""
        return sum(self.predicted.values()) / sum(self.measured.values()) - 1


def cases() -> Iterator[Case]:
    for precision in ("fp32", "bf16", BF16_WEIGHTS):
        for checkpointing in (
            "none",
            "auto",
            {"every": 1},
            {"every": 3},
            {"number": 3},
            {"selective": {"ratio": 0.5}},
            {"selective": {"ops": "cheap"}},
        ):
            yield Case(layers=6, precision=precision, checkpointing=checkpointing)
        for loss_chunk in ("auto", "none", 64):
            yield Case(vocab_size=4000, loss_chunk=loss_chunk, precision=precision)
        yield Case(accumulation=1, precision=precision)
        yield Case(seq_len=512, micro=1, precision=precision)
        yield Case(seq_len=32, micro=16, precision=precision)
        yield Case(layers=2, hidden=256, heads=8, precision=precision)
        yield Case(layers=12, hidden=64, heads=2, micro=8, precision=precision)
        yield Case(layers=2, vocab_size=50_257, micro=1, precision=precision)


def measure(case: Case) -> Outcome:
    """Two steps on the CPU, the second one counted."""
    spec = case.spec()
    data = open_data(spec, show_progress=False)
    backend = registry.load("cpu")
    engine = backend.start(backend.resolve(spec, 1), model_source(spec, data.vocab_size), Job())

    def step(number: int) -> StepInput:
        batches = data.micro_batches(number, 0, 1)
        return StepInput(number, batches, 1e-3, data.target_tokens(number))

    try:
        engine.train_step(step(0), None, NullTrace())
        ledger = Ledger(engine.holdings)
        with ledger.open():
            engine.train_step(step(1), None, ledger)
        (measured,) = ledger.peaks.values()
    finally:
        engine.close()
    peak = Step(spec, dimensions(spec), case.accumulation).peak
    return Outcome(case, dict(peak.bytes), measured, peak.name)


def report(outcomes: list[Outcome]) -> str:
    errors = [abs(outcome.error) for outcome in outcomes]
    rows = [
        (
            _techniques(one.case),
            f"{sum(one.predicted.values()) / 2**20:.2f}",
            f"{sum(one.measured.values()) / 2**20:.2f}",
            f"{one.error:+.1%}",
            one.at,
            *(f"{_megabytes(one.predicted, c)} / {_megabytes(one.measured, c)}" for c in MEMORY_CATEGORIES),
        )
        for one in outcomes
    ]
    headers = ["case", "predicted", "measured", "error", "peak at", *MEMORY_CATEGORIES]
    facts = environment()
    return "\n".join(
        [
            f"# Predicted against measured, {datetime.now(UTC):%Y-%m-%d}",
            "",
            __doc__.strip().split("\n\n", 1)[1] if __doc__ else "",
            "",
            f"- {len(errors)} cases: median error {statistics.median(errors):.1%}, worst {max(errors):.1%}",
            f"- {facts['cpu']}, {facts['platform']}; Python {facts['python']}, packages {facts['packages']}",
            "- MiB at the peak; by category predicted / measured",
            "",
            tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True),
            "",
        ]
    )


def _techniques(case: Case) -> str:
    changed = {k: v for k, v in asdict(case).items() if v != getattr(Case(), k)}
    return ", ".join(f"{k} {json.dumps(v)}" for k, v in changed.items()) or "default"


def _megabytes(found: Mapping[str, int], category: str) -> str:
    return f"{found.get(category, 0) / 2**20:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS)
    folder = parser.parse_args().out
    outcomes = []
    for case in cases():
        outcomes.append(measure(case))
        print(f"{outcomes[-1].error:+7.2%}  {outcomes[-1].at:9}  {_techniques(case)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"plan-accuracy-{datetime.now(UTC):%Y-%m-%d}"
    (folder / f"{name}.md").write_text(report(outcomes))
    (folder / f"{name}.json").write_text(json.dumps([asdict(one) for one in outcomes], indent=1))


if __name__ == "__main__":
    main()
