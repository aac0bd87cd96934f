"""Whatever stands in a record: a report, or a refusal that names the file; never a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

from tests.report.sample_lanes import run
from xtrain.errors import RequestError
from xtrain.records.record import MatmulFacts, ModelFacts, RankBusy
from xtrain.report.build import compare_lanes
from xtrain.report.page import render_page
from xtrain.report.runs import LaneRuns, Run, read_run
from xtrain.report.text import render_markdown, render_terminal

TRIED = 3
"""Odd values at each place; the next place begins with the next value."""
ODD: list[Any] = [
    None,
    -1,
    0,
    2**63 - 1,
    10**400,
    1e308,
    -1e308,
    5e-324,
    "",
    "<b>\x1b[2J\ud800",
    [],
    {},
    [[]],
    True,
]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything in a JSON value, sections too."""
    yield path
    if isinstance(value, dict):
        for key, below in value.items():
            yield from leaves(below, (*path, key))
    elif isinstance(value, list):
        for number, below in enumerate(value):
            yield from leaves(below, (*path, number))


def changed(record: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = deepcopy(record)
    section = copy
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    return copy


def full_run() -> Run:
    predicted = {"peak_bytes": {"cpu": {"parameters": 40 << 20}}, "at": {"cpu": "loss"}, "reason": None}
    return run(
        predicted=predicted,
        rank_seconds=[{"forward": 1.0}, {"forward": 1.5}],
        busy=[RankBusy(device=0.5, host_cores=1.0), RankBusy(device=None, host_cores=None)],
        matmul=MatmulFacts(dtype="fp32", flops_per_second=1e11, datasheet=2e11),
        model=ModelFacts(description="x", parameters=1_000_000, layers=4, hidden=128),
        environment={"cpu": "x", "platform": "y", "memory_bytes": 1 << 30, "packages": {"torch": "2.13.0"}},
    )


def report_of(folder: Path, sound: Run) -> bool:
    """Whether the record at `folder` could be reported beside a sound one."""
    try:
        odd = read_run(folder)
    except RequestError as error:
        if str(folder) not in str(error):
            raise
        return False
    for lanes in ([odd], [sound]), ([sound], [odd]):
        named = [LaneRuns(name, "finished", None, runs) for name, runs in zip("ab", lanes, strict=True)]
        comparison = compare_lanes("t", named)
        for text in (render_terminal(comparison), render_markdown(comparison)):
            assert "\x1b" not in text
        assert "<b>" not in render_page(comparison, "")
        json.dumps(comparison.model_dump(mode="json"), allow_nan=False)
    return True


RECORD = json.loads(full_run().record.model_dump_json())


@pytest.mark.parametrize("section", [*RECORD, ""])
def test_every_odd_value_in_a_record_is_shown_or_refused(tmp_path: Path, section: str) -> None:
    sound = full_run()
    (tmp_path / "metrics.jsonl").write_text("".join(f"{step.line()}\n" for step in sound.steps[:3]))
    record = tmp_path / "record.json"
    paths = [path for path in leaves(RECORD) if (str(path[0]) if path else "") == section]
    values = cycle(ODD)
    for path in paths:
        for value in islice(values, TRIED):
            record.write_text(json.dumps(changed(RECORD, path, value)), encoding="utf-8")
            try:
                reported = report_of(tmp_path, sound)
            except Exception as error:
                raise AssertionError(f"{path} = {str(value)[:40]!r}") from error
            assert reported in (True, False), path


@pytest.mark.parametrize("value", [1e308, -1e308, 5e-324, 0])
def test_odd_figures_in_metrics_are_shown(tmp_path: Path, value: float) -> None:
    sound = full_run()
    keys = ("loss", "grad_norm", "seconds", "lr")
    lines = [json.loads(step.line()) | dict.fromkeys(keys, value) for step in sound.steps]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (tmp_path / "record.json").write_text(json.dumps(RECORD))
    assert report_of(tmp_path, sound)


def test_long_texts_in_a_record_make_no_large_page(tmp_path: Path) -> None:
    """Ten thousand characters wherever there is a text, and hundreds of keys in the spec."""
    long: Any = deepcopy(RECORD)
    for path in leaves(RECORD):
        if path and isinstance(_at(long, path), str) and path[0] not in ("status", "memory"):
            long = changed(long, path, f"{path[-1]} " + "x" * 10_000)
    long["spec"] |= {f"key {number}": "x" * 10_000 for number in range(500)}
    long["memory"][0]["step_peaks"]["peaks"] |= {f"{'p' * 10_000}:{n}": {"other": n} for n in range(500)}
    long |= {"status": "failed", "failure": "x" * 100_000}
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "record.json").write_text(json.dumps(long))
    odd = read_run(tmp_path)
    lanes = [LaneRuns(name, "finished", None, [one]) for name, one in (("a", full_run()), ("b", odd))]
    lanes.append(LaneRuns("c", "failed", odd.record.failure, []))
    assert len(render_page(compare_lanes("t", lanes), "")) < 200_000


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        value = value[part]
    return value
