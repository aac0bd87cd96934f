"""`xtrain report`: runs from anywhere, none of them trusted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.sample_runs import sample_record, sample_steps, write_run
from xtrain.cli import main
from xtrain.errors import RequestError
from xtrain.records.record import DataFacts
from xtrain.report.comparison import Comparison
from xtrain.report.folder import StoredEnd, StoredLane, write_list
from xtrain.report.places import stored_lanes


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
    lanes = stored_lanes([str(tmp_path / "first")])
    assert [(lane.name, len(lane.runs)) for lane in lanes] == [("cpu", 2), ("deepspeed-2", 1)]
    other = write_run(tmp_path / "other")
    assert names(tmp_path / "first", other) == ["first/cpu", "first/deepspeed-2", "other"]


def test_repeats_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(1, 12):
        write_run(tmp_path / "lanes" / "cpu" / f"run-{number}")
    (lane,) = stored_lanes([str(tmp_path)])
    assert [run.directory.name for run in lane.runs if run.directory] == [f"run-{n}" for n in range(1, 12)]


def listed(folder: Path) -> None:
    """A comparison of which three lanes ended somehow and one never began, the last first by name."""
    ended = [
        StoredLane(name="mps", folder="mps", ends=[ended_run("refused", "no Apple GPU")]),
        StoredLane(name="deepspeed:2 a=1", folder="deepspeed-2-a=1", ends=[ended_run("finished")]),
        StoredLane(name="cpu", folder="cpu", ends=[ended_run("finished"), ended_run("failed", "killed", 2)]),
        StoredLane(name="null", folder="null", ends=[]),
    ]
    write_run(folder / "lanes" / "deepspeed-2-a=1" / "run-1")
    write_run(folder / "lanes" / "cpu" / "run-1")
    write_list(folder, ended)


def test_a_comparison_keeps_its_ladder(tmp_path: Path) -> None:
    write_run(tmp_path / "lanes" / "a" / "run-1")
    write_list(
        tmp_path, [StoredLane(name="a", folder="a", ladder="cpu", rung=2, ends=[ended_run("finished")])]
    )
    (rung,) = merged(tmp_path, tmp_path).ladder
    assert (rung.lane, rung.name) == ("cpu", "+ gradient accumulation")


def ended_run(outcome: Any, reason: str | None = None, number: int = 1) -> StoredEnd:
    return StoredEnd(run=f"run-{number}", outcome=outcome, reason=reason, seconds=1.0)


def test_a_comparison_keeps_the_order_and_the_names_of_its_lanes_and_those_without_a_record(
    tmp_path: Path,
) -> None:
    listed(tmp_path)
    assert [(lane.name, lane.outcome, lane.reason) for lane in stored_lanes([str(tmp_path)])] == [
        ("mps", "refused", "no Apple GPU"),
        ("deepspeed:2 a=1", "finished", None),
        ("cpu", "failed", "killed"),
        ("null", "failed", "the comparison ended before its first run did"),
    ]


def test_a_comparison_without_a_list_has_rows_for_lanes_without_a_record(tmp_path: Path) -> None:
    write_run(tmp_path / "lanes" / "cpu" / "run-1")
    (tmp_path / "lanes" / "mps").mkdir()
    (tmp_path / "lanes" / "mps" / "run-1.log").write_text("hello\nerror: no Apple GPU\n")
    (tmp_path / "lanes" / "null").mkdir()
    assert [(lane.name, lane.outcome, lane.reason) for lane in stored_lanes([str(tmp_path)])] == [
        ("cpu", "finished", None),
        ("mps", "failed", "error: no Apple GPU"),
        ("null", "failed", "it left no record"),
    ]


@pytest.mark.parametrize(
    ("list_", "said"),
    [
        ("[]", "expected a mapping"),
        ('{"lanes": [{}]}', "lanes.json is no list of lanes: lanes.0.name: Field required"),
        ('{"lanes": [{"name": "a", "folder": "../..", "ends": []}]}', "is no name of a folder"),
        ('{"lanes": [{"name": "a", "folder": "a", "rung": 9, "ends": []}]}', "lanes.0.rung: "),
        ('{"lanes": []}', "a comparison without any lane; nothing to report"),
    ],
)
def test_a_list_of_lanes_is_not_trusted(tmp_path: Path, list_: str, said: str) -> None:
    (tmp_path / "lanes").mkdir()
    (tmp_path / "lanes.json").write_text(list_)
    with pytest.raises(RequestError) as caught:
        stored_lanes([str(tmp_path)])
    assert said in str(caught.value)


def test_a_killed_run_is_a_row_with_what_is_known_of_it(tmp_path: Path) -> None:
    whole, killed = write_run(tmp_path / "a"), write_run(tmp_path / "b", sample_steps(7))
    (killed / "record.json").unlink()
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # it was being written
    done = report(whole, killed, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    said = "it left no record: it was killed, or still runs (7 steps done, the last loss 3.2506)"
    assert f"Not b: it failed: {said}" in done.output
    (killed / "metrics.jsonl").rename(killed / "resolved.json")  # killed before its first update
    assert stored_lanes([str(killed)])[0].reason == (
        "it left no record: it was killed, or still runs (0 steps done)"
    )


# --- repeats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"backend": "deepspeed"}, "backend deepspeed instead of cpu"),
        ({"world": 2}, "processes 2 instead of 1"),
        ({"data": DataFacts(description="x", hash="def", portable=True)}, "data def instead of abc"),
        ({"spec": {"train": {"steps": 30}}}, "train.steps 30 instead of 20"),
    ],
)
def test_runs_of_one_name_that_are_no_repeats_are_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    first, second = write_run(tmp_path / "1"), write_run(tmp_path / "2", **changes)
    done = report(f"a={first}", f"a={second}", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: a: {second} is no repeat of {first}: ")
    assert said in done.stderr
    assert "give them names of their own, A=PATH B=PATH" in done.stderr
    assert names(f"a={first}", f"b={second}") == ["a", "b"]


def test_repeats_may_lie_and_log_elsewhere(tmp_path: Path) -> None:
    spec = sample_record().spec
    first = write_run(tmp_path / "1", spec={**spec, "log": {"every_steps": 10}})
    second = write_run(tmp_path / "2", spec={**spec, "log": {"every_steps": 1}})
    assert names(f"a={first}", f"a={second}") == ["a"]


def test_unlike_repeats_of_one_training_are_flagged(tmp_path: Path) -> None:
    first = write_run(tmp_path / "1")
    environment = {"cpu": "another", "packages": {"torch": "2.9.0"}}
    second = write_run(tmp_path / "2", sample_steps(12), environment=environment, status="interrupted")
    assert merged(tmp_path, f"a={first}", f"a={second}").warnings[-3:] == [
        "a: its repeats took 20, 12 steps",
        "a: its repeats ran on different machines, and their speeds differ by that",
        "a: its repeats ran with different versions",
    ]


def test_a_run_that_stands_twice_is_one_measurement_and_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "lanes" / "cpu" / "run-1")
    for places in ([f"a={run}", f"a={run}"], [f"a={run}", f"b={run}/../run-1"], [str(tmp_path), str(run)]):
        with pytest.raises(RequestError, match=r"run-1 stands twice; expected each run once"):
            stored_lanes(places)


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


def test_a_run_that_was_interrupted_says_so_beside_its_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", sample_steps(12), status="interrupted")
    done = report(run, "--out", tmp_path / "out")
    assert "12 (interrupted)" in done.output


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


@pytest.mark.parametrize(
    ("value", "exit_code"),
    [("NaN", 2), ("1e999", 2), ('"fast"', 2), ("-1.0", 0), ("0.0", 0), ("1e300", 0)],
)
def test_an_impossible_speed_is_refused_or_counts_as_not_measured(
    tmp_path: Path, value: str, exit_code: int
) -> None:
    run = write_run(tmp_path / "a")
    record = json.loads((run / "record.json").read_text())
    record["speed"]["tokens_per_second"] = "HERE"
    (run / "record.json").write_text(json.dumps(record).replace('"HERE"', value))
    done = report(run, "--out", tmp_path / "out", "--json")
    assert done.exit_code == exit_code, done.output
    if exit_code == 0:
        assert json.loads(done.stdout)["lanes"][0]["figures"]["speed"] is None


@pytest.mark.parametrize("place", ["nowhere", "name=nowhere", ""])
def test_a_place_without_a_run_is_refused(tmp_path: Path, place: str) -> None:
    done = report(place, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "no such file; expected the record of a run" in done.stderr


# --- runs of another machine ---------------------------------------------------------------------

ELSEWHERE = Path(__file__).parent / "elsewhere"
"""Of the null engine, its environment written by hand: no Mac has run it, and its record says so."""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """The same spec, trained by the null engine on this machine."""
    command = ["run", str(ELSEWHERE / "spec.yaml"), "--backend", "null", "--out", str(tmp_path / "here")]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return tmp_path / "here"


def merged(tmp_path: Path, *places: str | Path) -> Comparison:
    done = report(*places, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    return Comparison.model_validate_json(done.stdout)


def test_a_run_from_another_platform_meets_one_from_here_and_what_is_unlike_is_flagged(
    tmp_path: Path, here: Path
) -> None:
    found = merged(tmp_path, f"there={ELSEWHERE}", here)
    machines, versions = found.warnings
    assert machines.startswith("the lanes ran on different machines, and their speeds compare these too ")
    assert versions.startswith("versions differ: ")
    assert "torch" in versions
    losses, *_ = found.verdicts
    assert losses.headline == "The losses agree"  # synthetic data is the same everywhere
    assert "Apple M3 (written by hand)" in (tmp_path / "out" / "report.md").read_text()


def test_another_spec_from_elsewhere_is_flagged_too(tmp_path: Path, here: Path) -> None:
    record = json.loads((here / "record.json").read_text())
    record["spec"]["optimizer"]["lr"] = 1.01e-3
    record["spec"]["precision"] = {"dtype": "bf16", "weights": "fp32"}
    record["data"]["hash"] = "0" * 64
    (here / "record.json").write_text(json.dumps(record))
    said = "\n".join(merged(tmp_path, f"there={ELSEWHERE}", here).warnings)
    assert "the lanes saw different data: their losses cannot be compared" in said
    assert "here was given another training than there: optimizer.lr 0.00101 instead of 0.001" in said
    assert "precision differs: losses agree only roughly (fp32: there; bf16 over fp32 weights: here)" in said
