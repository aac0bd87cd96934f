"""`xtrain report`: runs from anywhere, none of them trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.sample_runs import sample_steps, write_run
from xtrain.cli import main
from xtrain.errors import RequestError
from xtrain.report.comparison import Comparison
from xtrain.report.runs import stored_lanes


def report(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, words)])


def names(*places: str | Path) -> list[str]:
    return [lane.name for lane in stored_lanes([str(place) for place in places])]


def test_a_lane_is_named_after_its_folder_made_long_enough(tmp_path: Path) -> None:
    here, there = write_run(tmp_path / "here" / "run"), write_run(tmp_path / "there" / "run")
    assert names(here) == ["run"]
    assert names(here, there) == ["here/run", "there/run"]
    assert names(f"mac={here}", there) == ["mac", "run"]


def test_runs_of_one_name_are_repeats_of_one_lane(tmp_path: Path) -> None:
    first, second = write_run(tmp_path / "1"), write_run(tmp_path / "2", sample_steps(seconds=0.25))
    (lane,) = stored_lanes([f"a={first}", f"a={second}"])
    assert len(lane.runs) == 2


def test_a_comparison_brings_its_lanes_with_their_repeats(tmp_path: Path) -> None:
    for lane, run in [("cpu", "run-1"), ("cpu", "run-2"), ("deepspeed-2", "run-1")]:
        write_run(tmp_path / "first" / "lanes" / lane / run)
    (tmp_path / "first" / "lanes" / "mps").mkdir()
    lanes = stored_lanes([str(tmp_path / "first")])
    assert [(lane.name, len(lane.runs)) for lane in lanes] == [("cpu", 2), ("deepspeed-2", 1)]
    other = write_run(tmp_path / "other")
    assert names(tmp_path / "first", other) == ["first/cpu", "first/deepspeed-2", "other"]


def test_a_failed_run_is_a_row_with_its_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", status="failed", failure="cuda:0 is out of memory")
    done = report(tmp_path / "a", tmp_path / "b", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    lanes = json.loads((tmp_path / "out" / "report.json").read_text())["lanes"]
    assert [(lane["outcome"], lane["reason"]) for lane in lanes] == [
        ("finished", None),
        ("failed", "cuda:0 is out of memory"),
    ]
    assert "Not b: it failed: cuda:0 is out of memory" in done.output


def test_the_report_as_json_stands_alone_on_standard_output(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    done = report(run, "--out", tmp_path / "out", "--json")
    assert Comparison.model_validate_json(done.stdout).reference == "a"
    assert done.stderr == f"report in {tmp_path / 'out'}\n"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("record.json", "{}", "record.json is not a record: "),
        ("record.json", '{"speed": ' * 500, "record.json is not a record: "),
        ("metrics.jsonl", '{"step": -1}\n', "metrics.jsonl, line 1: step: "),
    ],
)
def test_a_bad_record_is_a_wrong_request_with_the_file_named(
    tmp_path: Path, file: str, content: str, said: str
) -> None:
    run = write_run(tmp_path / "a")
    (run / file).write_text(content)
    done = report(run, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert f"error: {run / said}" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["NaN", "-1.0", "1e999", '"fast"', "1e300", "0.0"])
def test_an_impossible_speed_is_refused_or_not_measured(tmp_path: Path, value: str) -> None:
    run = write_run(tmp_path / "a")
    record = json.loads((run / "record.json").read_text())
    record["speed"]["tokens_per_second"] = "HERE"
    (run / "record.json").write_text(json.dumps(record).replace('"HERE"', value))
    done = report(run, run, "--out", tmp_path / "out")
    assert done.exit_code in (0, 2)
    assert done.exit_code == 2 or "not measured" in done.output


@pytest.mark.parametrize("place", ["nowhere", "name=nowhere", ""])
def test_a_place_without_a_run_is_refused(tmp_path: Path, place: str) -> None:
    done = report(place, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "no such file; expected the record of a run" in done.stderr


def test_a_comparison_without_any_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lanes" / "mps").mkdir(parents=True)
    with pytest.raises(RequestError, match="a comparison in which no lane left a record; nothing to report"):
        stored_lanes([str(tmp_path)])
