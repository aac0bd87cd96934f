"""`make gpu`: what there is to prove and to measure on one NVIDIA GPU, within ten minutes.

    python -m benchmarks.gpu [--parts speed ladder] [--seconds 540] [--device cpu]

Conformance, speed beside a plain loop, the ladder of techniques, GPT-2 Large, checkpoints, DeepSpeed. Every
lane is a process of its own, every part has its share of the time and leaves the others theirs. Page, JSON
and a log of all that was printed grow under --out with every lane: a run that is broken off leaves what it
has. Installing comes before, so --seconds is less than ten minutes.
Without a GPU this says so and ends well: nothing was tested, nothing failed. `--device cpu` tries the
programs out with tiny sizes.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks.gpu_lanes import Bench, Row
from benchmarks.gpu_parts import PARTS, ends, rows_of
from benchmarks.gpu_report import markdown, told
from benchmarks.overhead import ROOT, say
from benchmarks.page import command_of
from xtrain.measure.machine import environment

NAMES = [part.name for part in PARTS]


def gpu_name() -> str | None:
    """With its memory and torch's CUDA; None where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"


def no_gpu() -> str:
    import torch

    reason = "no NVIDIA GPU found" if torch.version.cuda else "this torch is built without CUDA"
    return f"make gpu: {reason}; nothing was tested. Run it on a machine with an NVIDIA GPU."


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", default=NAMES, choices=NAMES, metavar="PART", help=f"of {NAMES}"
    )
    parser.add_argument("--seconds", type=float, default=540, help="for everything")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    name = gpu_name() if arguments.device == "cuda" else "CPU, tiny sizes: a trial of the programs"
    if name is None:
        print(no_gpu())
        return 0
    date = datetime.now(UTC).date().isoformat()
    command = command_of("gpu")
    header = {"date": date, "command": command, "device": name, "environment": environment()}
    path = arguments.out / f"gpu-{date}{'-trial' * (arguments.device == 'cpu')}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    about = {part.name: part.about for part in PARTS}
    rows: list[Row] = []
    started = perf_counter()
    parts = [part for part in PARTS if part.name in arguments.parts]
    with TemporaryDirectory() as folder:
        log = path.with_suffix(".log")
        log.unlink(missing_ok=True)
        bench = Bench(arguments.device, name, Path(folder), started + arguments.seconds, log)
        for part, over in zip(parts, ends(parts, arguments.seconds), strict=True):
            for row in rows_of(part, replace(bench, ends_at=started + over)):
                rows.append(row)
                say(told(row))
                report = {**header, "seconds": perf_counter() - started}
                path.write_text(
                    json.dumps({**report, "rows": [asdict(one) for one in rows]}, indent=1) + "\n"
                )
                path.with_suffix(".md").write_text(markdown(report, about, rows))
    say(f"written: {path}, {path.with_suffix('.md').name} and {log.name}")
    failed = [row for row in rows if row.outcome != "done" and not row.outcome.startswith("left out")]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
