"""The memory experiment: where a step's memory goes at batch 4, 8, 16, with accumulation, with checkpointing.

    python -m benchmarks.memory_experiment [--backend cpu] [--limit-mib 3000]

Every row is `xtrain run` in a fresh process for a few updates, its figures from record.json alone. A row that
does not fit or that the backend refuses says so; the others go on. `--limit-mib` caps a process's own
memory (Linux), so that running out can be seen on a machine that has plenty.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from tabulate import tabulate

from benchmarks.arguments import add_out, at_least
from xtrain import registry
from xtrain.measure.machine import environment
from xtrain.records.record import RankMemory, load_record
from xtrain.records.summary import format_bytes

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
SPEC = {
    "model": {
        "preset": "gpt2-nano",
        "layers": 6,
        "hidden": 384,
        "heads": 6,
        "positions": 512,
        "vocab_size": 8192,
    },
    "data": {"source": "synthetic", "seq_len": 512, "tokens": 200_000},
    "train": {"steps": 3},
    "optimizer": {"lr": 1e-3},
}
"""14 million parameters, context 512."""
CHECKPOINTING = {"memory": {"checkpointing": "auto"}}
ROWS: dict[str, dict[str, Any]] = {
    "batch 4": {"batch": {"global": 4}},
    "batch 8": {"batch": {"global": 8}},
    "batch 16": {"batch": {"global": 16}},
    "batch 16, 4 accumulated": {"batch": {"global": 16, "micro": 4}},
    "batch 16, checkpointing": {"batch": {"global": 16}, **CHECKPOINTING},
    "batch 16, both": {"batch": {"global": 16, "micro": 4}, **CHECKPOINTING},
    "batch 16, bf16": {"batch": {"global": 16}, "precision": "bf16"},
    "batch 16, bf16, both": {"batch": {"global": 16, "micro": 4}, "precision": "bf16", **CHECKPOINTING},
    "batch 16, whole logits": {"batch": {"global": 16}, "memory": {"loss_chunk": "none"}},
}
"""What each adds to SPEC."""
COLUMNS = ("parameters", "gradients", "optimizer", "activations", "logits", "other")

METHOD = """\
Each row is `xtrain run` for 3 updates in a fresh process: GPT-2 of 6 layers x 384, vocabulary 8,192
(14 million parameters), context 512, AdamW; fp32 and loss_chunk auto where the row says nothing else.
The categories are counted storage by storage in the second update, at its fullest moment
(`xtrain/measure/ledger.py`): where activations weigh most that is the end of the forward pass, when no
gradient exists yet; after the backward pass they are as many bytes as the parameters. *own count* is the
growth of the largest resident set since the model was built (MALLOC_MMAP_THRESHOLD_=131072), or the device's
peak counter where it has one; it includes what kernels use inside and, on the CPU, the data and what
building the model took.
"""


@dataclass(frozen=True)
class Row:
    """One run's outcome; bytes are None where it has none."""

    name: str
    outcome: str
    categories: dict[str, int] = field(default_factory=dict)
    """At the fullest moment of a step, on the place that held most."""
    own_count_bytes: int | None = None
    """By the device's peak counter, or the resident set above the imports."""

    @property
    def total_bytes(self) -> int | None:
        return sum(self.categories.values()) or None


def measure(name: str, changes: dict[str, Any], backend: str, limit_bytes: int | None) -> Row:
    """Run it; whatever comes of it is a row."""
    with TemporaryDirectory() as folder:
        spec, out = Path(folder) / "spec.yaml", Path(folder) / "out"
        spec.write_text(yaml.safe_dump({**SPEC, **changes}))
        done = subprocess.run(
            [sys.executable, "-m", "xtrain", "run", str(spec), "--backend", backend, "--out", str(out)],
            cwd=ROOT,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
            capture_output=True,
            text=True,
            preexec_fn=_limiter(limit_bytes),
        )
        if not (out / "record.json").exists():
            return Row(name, _last_error(done.stderr))
        record = load_record(out)
    outcome = "done" if record.status == "done" else (record.failure or "failed").splitlines()[0]
    return _row(name, outcome, record.memory[0])


def _limiter(limit_bytes: int | None) -> Callable[[], None] | None:
    if limit_bytes is None:
        return None
    return lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))


def _row(name: str, outcome: str, memory: RankMemory) -> Row:
    peaks = memory.step_peaks.peaks if memory.step_peaks else {}
    fullest = max(peaks.values(), key=lambda held: sum(held.values()), default={})
    if memory.live is not None:
        return Row(name, outcome, fullest, memory.live.peak_bytes)
    if memory.rss is None or memory.rss.peak_bytes is None or memory.rss_before_bytes is None:
        return Row(name, outcome, fullest)
    return Row(name, outcome, fullest, memory.rss.peak_bytes - memory.rss_before_bytes)


def _last_error(text: str) -> str:
    """The message, on one line, without the file's changing name."""
    message = text[text.rfind("error: ") :] if "error: " in text else text[-200:]
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return "refused: " + " ".join(lines[1:]) if len(lines) > 1 else " ".join(lines) or "failed"


def page(rows: list[Row], title: str) -> str:
    cells = [
        [
            row.name,
            *(format_bytes(row.categories.get(name, 0)) if row.categories else "" for name in COLUMNS),
            format_bytes(row.total_bytes) if row.categories else "",
            format_bytes(row.own_count_bytes) if row.own_count_bytes else "",
            row.outcome,
        ]
        for row in rows
    ]
    headers = ["", *COLUMNS, "total", "own count", "outcome"]
    return f"# {title}\n\n{METHOD}\n{tabulate(cells, headers, tablefmt='github', disable_numparse=True)}\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", default="cpu", choices=registry.names())
    parser.add_argument("--limit-mib", type=at_least(1), help="cap on each process's own memory")
    add_out(parser)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    limit_bytes = arguments.limit_mib * MIB if arguments.limit_mib else None
    rows = []
    for name, changes in ROWS.items():
        rows.append(measure(name, changes, arguments.backend, limit_bytes))
        print(
            f"{name}: {format_bytes(rows[-1].total_bytes)}, {rows[-1].outcome}", file=sys.stderr, flush=True
        )
    day = datetime.now(UTC).date().isoformat()
    limited = f", {arguments.limit_mib} MiB allowed" if arguments.limit_mib else ""
    stem = f"memory-{day}-{arguments.backend}" + (f"-{arguments.limit_mib}mib" if arguments.limit_mib else "")
    words = f"--backend {arguments.backend}" + (f" --limit-mib {arguments.limit_mib}" if limit_bytes else "")
    command = f"python -m benchmarks.memory_experiment {words}"
    found = {"command": command, "environment": environment(), "rows": [asdict(row) for row in rows]}
    (arguments.out / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n")
    text = page(rows, f"The memory experiment on {arguments.backend}{limited}, {day}")
    (arguments.out / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
