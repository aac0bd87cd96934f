"""`xtrain compare`: one spec on several lanes, in fresh processes that take turns, side by side."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from xtrain.errors import RequestError, RunFailed
from xtrain.lanes import Lane, LaneCommand, LaneEnd, run_lane, xtrain_run
from xtrain.report.build import compare_lanes
from xtrain.report.comparison import Comparison
from xtrain.report.folder import LANES, StoredEnd, StoredLane, read_lanes, write_list
from xtrain.report.write import write_report


def compare(
    spec_path: Path,
    lanes: Sequence[Lane],
    out: Path,
    overrides: Sequence[str] = (),
    repeats: int = 1,
    command: LaneCommand = xtrain_run,
) -> Comparison:
    """Train `spec_path` `repeats` times on every one of `lanes`, and report in `out`.

    Runs go to lanes/<lane>/run-<n>, their output beside them. A lane that cannot run or fails is a row with
    its reason and is not repeated; `Comparison.exit_code` says what came of all. Raises RequestError, with
    nothing started, for a missing spec and an `out` that exists.
    """
    if not spec_path.is_file():
        raise RequestError(f"{spec_path}: no such file; expected a spec")
    _make(out)
    turns = Turns(lanes, repeats)
    places = lane_folders(out / LANES, lanes)
    _note(out, places, turns)
    for lane, repeat in turns:
        places[lane].mkdir(exist_ok=True)
        directory = places[lane] / f"run-{repeat}"
        log = directory.with_suffix(".log")
        _say(f"{turns.progress(lane, repeat)}; its output goes to {log}")
        with _told_what_is_there(out):
            end = run_lane(command(lane, spec_path, directory, overrides), log)
        _say(f"{lane.name}: {end.outcome} in {end.seconds:.1f} s{f': {end.reason}' if end.reason else ''}")
        turns.took(lane, end, directory)
        _note(out, places, turns)
    comparison = compare_lanes(spec_path.name, read_lanes(out))
    write_report(out, comparison)
    return comparison


@dataclass
class Turns:
    """Who runs next. Lanes take turns, and every other round goes backwards: a machine that slowly gets
    warmer or busier then favours nobody."""

    lanes: Sequence[Lane]
    repeats: int
    ends: dict[Lane, list[tuple[LaneEnd, Path]]] = field(default_factory=dict)
    done: int = 0

    def __iter__(self) -> Iterator[tuple[Lane, int]]:
        """(lane, repeat, 1-based); a lane that did not finish has no further turns."""
        for repeat in range(1, self.repeats + 1):
            for lane in self.lanes if repeat % 2 else reversed(self.lanes):
                if self._goes_on(lane):
                    yield lane, repeat

    def took(self, lane: Lane, end: LaneEnd, directory: Path) -> None:
        self.done += 1
        self.ends.setdefault(lane, []).append((end, directory))

    def progress(self, lane: Lane, repeat: int) -> str:
        """Which of how many, and from the second round on how long all of it may still take."""
        left = [
            one for one in self.lanes if self._goes_on(one) for _ in range(self.repeats - self._turns(one))
        ]
        known = [self._seconds(one) for one in left]
        seconds = [one for one in known if one is not None]
        estimate = f", about {sum(seconds):.0f} s left" if len(seconds) == len(known) else ""
        place = f"run {self.done + 1} of {self.done + len(left)}{estimate}"
        return f"{place}: {lane.name}, repeat {repeat} of {self.repeats}"

    def _goes_on(self, lane: Lane) -> bool:
        return all(end.outcome == "finished" for end, _ in self.ends.get(lane, []))

    def _turns(self, lane: Lane) -> int:
        return len(self.ends.get(lane, []))

    def _seconds(self, lane: Lane) -> float | None:
        ends = self.ends.get(lane, [])
        return sum(end.seconds for end, _ in ends) / len(ends) if ends else None


def lane_folders(parent: Path, lanes: Sequence[Lane]) -> dict[Lane, Path]:
    """A folder for each lane; those of equal name have a number."""
    found: dict[Lane, Path] = {}
    for lane in lanes:
        same = [path for path in found.values() if path.name.partition("~")[0] == lane.folder]
        found[lane] = parent / (f"{lane.folder}~{len(same) + 1}" if same else lane.folder)
    return found


def _note(out: Path, places: Mapping[Lane, Path], turns: Turns) -> None:
    """How far it is, for `xtrain report` of a comparison that is cut off."""
    stored = [
        StoredLane(
            name=lane.name,
            folder=places[lane].name,
            ladder=None if lane.rung is None else lane.engine,
            rung=lane.rung or 0,
            ends=[
                StoredEnd(run=run.name, outcome=end.outcome, reason=end.reason, seconds=end.seconds)
                for end, run in turns.ends.get(lane, [])
            ],
        )
        for lane in turns.lanes
    ]
    try:
        write_list(out, stored)
    except OSError as error:
        raise RunFailed(f"cannot write in {out}: {error.strerror}") from error


@contextmanager
def _told_what_is_there(out: Path) -> Iterator[None]:
    """Whoever ends a comparison is told that what was measured is not lost."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        place = shlex.quote(str(out))
        _say(f"cut off; to see what has finished: xtrain report {place} --out {place}")
        raise


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True)
        (out / LANES).mkdir()
    except FileExistsError:
        raise RequestError(f"{out} exists already; choose another --out") from None
    except OSError as error:
        raise RequestError(f"cannot create {out}: {error.strerror}") from error


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
