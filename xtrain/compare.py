"""`xtrain compare`: one spec on several backends, side by side."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from xtrain.comparison import Comparison, compare_runs
from xtrain.errors import RequestError
from xtrain.lanes import LaneCommand, parse_lanes, run_lane, xtrain_run
from xtrain.report import render_markdown
from xtrain.rundir import write_json, write_text


def compare(
    spec_path: Path,
    backends: Sequence[str],
    out: Path,
    overrides: Sequence[str] = (),
    command: LaneCommand = xtrain_run,
) -> Comparison:
    """Train `spec_path` on every lane of `backends`, one after another, and report in `out`.

    Writes report.md and report.json; runs go to lanes/<lane>, their output beside them. A lane that
    cannot run or fails is a row with its reason; `Comparison.exit_code` says what came of all. Raises
    RequestError, with nothing started, for an unknown lane, a missing spec, or an `out` that exists.
    """
    lanes = parse_lanes(backends)
    if not spec_path.is_file():
        raise RequestError(f"{spec_path}: no such file; expected a spec")
    _make(out)
    ends = []
    for number, lane in enumerate(lanes, start=1):
        directory, log = out / "lanes" / lane.folder, out / "lanes" / f"{lane.folder}.log"
        _say(f"lane {number} of {len(lanes)}, {lane.name}: running; its output goes to {log}")
        end = run_lane(command(lane, spec_path, directory, overrides), log)
        _say(
            f"lane {lane.name}: {end.outcome} in {end.seconds:.1f} s{f': {end.reason}' if end.reason else ''}"
        )
        ends.append((lane.name, end, directory))
    comparison = compare_runs(spec_path.name, ends)
    write_json(out / "report.json", comparison.model_dump(mode="json"))
    write_text(out / "report.md", render_markdown(comparison))
    return comparison


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True)
        (out / "lanes").mkdir()
    except FileExistsError:
        raise RequestError(f"{out} exists already; choose another --out") from None
    except OSError as error:
        raise RequestError(f"cannot create {out}: {error.strerror}") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
