from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.sample_runs import MIB, sample_memory, sample_record, sample_steps, write_run
from tests.started import running
from xtrain.cli import main
from xtrain.compare import Turns, compare, lane_folders
from xtrain.errors import RequestError
from xtrain.lanes import Lane, LaneEnd, parse_lanes, run_lane, xtrain_run
from xtrain.records.metrics import StepRecord
from xtrain.records.record import DataFacts, StepPeaks
from xtrain.report.agreement import largest_difference
from xtrain.report.build import compare_lanes
from xtrain.report.comparison import Comparison
from xtrain.report.places import stored_lanes
from xtrain.report.runs import ended_lane
from xtrain.report.text import render_markdown, render_terminal

FINISHED = LaneEnd("finished", None, 1.0)
Ends = Sequence[tuple[str, LaneEnd, Path]]


def compare_runs(title: str, ends: Ends) -> Comparison:
    return compare_lanes(title, [ended_lane(name, [(end, directory)]) for name, end, directory in ends])


STUB = Path(__file__).with_name("stub_lane.py")


# --- lanes ----------------------------------------------------------------------------------


def test_a_lane_is_a_backend_and_perhaps_its_processes() -> None:
    assert parse_lanes(["cpu", "deepspeed:2"]) == [Lane("cpu"), Lane("deepspeed", 2)]
    assert [Lane("deepspeed", 2).name, Lane("deepspeed", 2).folder] == ["deepspeed:2", "deepspeed-2"]


@pytest.mark.parametrize(
    ("lanes", "message"),
    [
        ([], "--backends is empty; expected a list such as cpu,deepspeed"),
        (["cpu", "cpu"], "lane 'cpu' stands twice in --backends; name each lane once"),
        (["cpu:0"], "lane 'cpu:0': expected a backend such as cpu, or deepspeed:2 for 2 processes"),
        (["../x"], "lane '../x': expected a backend such as cpu, or deepspeed:2 for 2 processes"),
        (["tpu"], "lane 'tpu': no backend named 'tpu'; installed: cpu, cuda, deepspeed, mps, null"),
    ],
)
def test_impossible_lanes_are_refused(lanes: list[str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_lanes(lanes)
    assert str(caught.value) == message


def test_lanes_with_long_names_have_folders_of_their_own(tmp_path: Path) -> None:
    """Longer than a file system takes, in letters of two bytes."""
    lanes = [Lane("cpu", label="\u00e4" * 300 + end) for end in "abc"]
    folders = lane_folders(tmp_path, lanes)
    for folder in folders.values():
        folder.mkdir()
    assert len({*folders.values()}) == 3


def test_a_lane_is_the_same_command_that_people_type() -> None:
    command = xtrain_run(Lane("deepspeed", 2), Path("a.yaml"), Path("out/x"), ["train.steps=3"])
    expected = "-m xtrain run a.yaml --backend deepspeed --out out/x --nproc 2 --set train.steps=3"
    assert command == [sys.executable, *expected.split()]


def test_a_lane_runs_this_xtrain_also_where_there_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xtrain.py").write_text("raise SystemExit('this is another xtrain')")
    monkeypatch.chdir(tmp_path)
    command = xtrain_run(Lane("cpu"), Path("a.yaml"), Path("out"), [])
    asked = [*command[: command.index("xtrain")], "xtrain.request"]  # as light a module as any
    done = subprocess.run(asked, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# --- figures --------------------------------------------------------------------------------


def losses(*values: float | None, norm: float | None = 1.0) -> list[StepRecord]:
    return [StepRecord(i + 1, v, 1e-3, norm, 10, 0.1, v is None) for i, v in enumerate(values)]


def test_the_largest_difference_is_relative_to_the_reference_and_knows_its_step() -> None:
    found = largest_difference(losses(4.0, 2.5, 1.0), losses(4.0, 2.0, 1.1), "loss")
    assert found is not None
    assert (found.relative, found.step) == (0.25, 2)


def test_equal_curves_differ_by_nothing_at_the_first_step() -> None:
    found = largest_difference(losses(4.0, 2.0), losses(4.0, 2.0), "loss")
    assert found is not None
    assert (found.relative, found.step) == (0.0, 1)


def test_steps_that_only_one_lane_has_are_not_compared() -> None:
    found = largest_difference(losses(4.0, None, 1.0, 9.0), losses(4.0, 2.0, 1.0), "loss")
    assert found is not None
    assert found.relative == 0.0
    assert largest_difference(losses(None), losses(1.0), "loss") is None
    assert largest_difference(losses(1.0, norm=None), losses(1.0), "grad_norm") is None


def test_a_difference_from_zero_and_from_almost_zero_is_finite() -> None:
    for reference, value, relative in [(0.0, 0.0, 0.0), (0.0, 2.0, 1.0), (1e-320, 1e300, sys.float_info.max)]:
        found = largest_difference(losses(value), losses(reference), "loss")
        assert found is not None
        assert found.relative == relative


def compared(root: Path, **lanes: dict[str, Any]) -> Comparison:
    """One finished run for each lane, with what is changed in its record and steps."""
    ends = [(name, FINISHED, write_run(root / name, **changes)) for name, changes in lanes.items()]
    return compare_runs("tiny.yaml", ends)


def test_equal_lanes_give_no_warning(tmp_path: Path) -> None:
    comparison = compared(tmp_path, cpu={}, deepspeed={"backend": "deepspeed"})
    assert comparison.reference == "cpu"
    assert comparison.warnings == []
    assert comparison.exit_code == 0
    reference, other = (lane.figures for lane in comparison.lanes)
    assert reference is not None
    assert reference.loss_difference is None
    assert other is not None
    assert other.loss_difference is not None
    assert other.loss_difference.relative == 0.0
    assert other.grad_norm_difference is not None


def spec_with(**sections: object) -> dict[str, object]:
    return {**sample_record().spec, **sections}


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        (
            {"data": DataFacts(description="other", hash=None, portable=False)},
            "the lanes saw different data: their losses cannot be compared (abc: cpu; unknown: other)",
        ),
        ({"threads": 2}, "threads per process differ, and with them the speed (1: cpu; 2: other)"),
        (
            {"matmul_precision": "high"},
            "the precision of fp32 matrix products differs (highest: cpu; high: other)",
        ),
        (
            {"spec": spec_with(precision={"dtype": "bf16", "weights": "fp32"})},
            "precision differs: losses agree only roughly (fp32: cpu; bf16 over fp32 weights: other)",
        ),
        (
            {"threads": None},
            "threads per process differ, and with them the speed (1: cpu; unknown: other)",
        ),
        ({"steps": sample_steps(18)}, "other: 2 steps lack a finite loss here or in the reference"),
    ],
)
def test_what_makes_a_comparison_unfair_is_said(
    tmp_path: Path, changes: dict[str, Any], warning: str
) -> None:
    assert compared(tmp_path, cpu={}, other=changes).warnings == [warning]


def test_dropout_is_said_of_all_lanes(tmp_path: Path) -> None:
    dropped = {"spec": spec_with(model={"dropout": 0.1})}
    warning = "dropout is on: the losses of unlike engines agree only statistically"
    assert compared(tmp_path, cpu=dropped, other=dropped).warnings == [warning]


def test_the_reference_is_the_first_lane_that_finished(tmp_path: Path) -> None:
    ends = [
        ("cuda", LaneEnd("refused", "no GPU", 0.1), tmp_path / "cuda"),
        ("cpu", FINISHED, write_run(tmp_path / "cpu")),
    ]
    comparison = compare_runs("tiny.yaml", ends)
    assert comparison.reference == "cpu"
    assert [(lane.outcome, lane.reason) for lane in comparison.lanes] == [
        ("refused", "no GPU"),
        ("finished", None),
    ]
    assert comparison.exit_code == 0


def test_a_lane_without_a_readable_record_has_failed(tmp_path: Path) -> None:
    write_run(tmp_path / "cpu")
    (tmp_path / "cpu" / "metrics.jsonl").write_text("{}\n")
    comparison = compare_runs("tiny.yaml", [("cpu", FINISHED, tmp_path / "cpu")])
    assert comparison.lanes[0].outcome == "failed"
    assert "metrics.jsonl, line 1: step: Field required" in str(comparison.lanes[0].reason)
    assert comparison.exit_code == 1


# --- reports --------------------------------------------------------------------------------

TERMINAL = Path(__file__).parent / "report" / "terminal.txt"


def two_lanes(root: Path) -> Comparison:
    sampled = write_run(root / "cpu", memory=[sample_memory(0, 100 * MIB, "sampled")])
    steps = sample_steps()
    steps[6] = replace(steps[6], loss=1.01 * (steps[6].loss or 0))
    sharded = {"world": 2, "backend": "deepspeed", "speed": None}
    ends = [
        ("cpu", FINISHED, sampled),
        ("deepspeed:2", FINISHED, write_run(root / "ds", steps, memory=[sample_memory()], **sharded)),
    ]
    return compare_runs("tiny.yaml", ends)


def test_the_whole_terminal_report_with_unlike_counters_apart(tmp_path: Path) -> None:
    assert render_terminal(two_lanes(tmp_path)) == TERMINAL.read_text().rstrip()


def test_the_markdown_report_has_verdicts_method_tables_and_environment(tmp_path: Path) -> None:
    text = render_markdown(two_lanes(tmp_path))
    assert text.startswith(
        "# tiny.yaml\n\n**The losses do not agree: deepspeed:2 left cpu.**\n\n- deepspeed:2: "
    )
    assert "relative to cpu." in text
    for title in ("## Losses\n\n| lane ", "## Speed\n\n| lane ", "## Memory\n\n| lane "):
        assert title in text
    assert re.search(r"^\| torch +\| 2\.13\.0 +\| 2\.13\.0 +\|$", text, flags=re.MULTILINE)


def test_where_a_step_s_memory_went_is_a_table_of_its_own(tmp_path: Path) -> None:
    peaks = {"cpu": {"parameters": MIB, "logits": 0}, "cuda:0": {"parameters": 2 * MIB, "activations": MIB}}
    counted = sample_memory().model_copy(update={"step_peaks": StepPeaks(step=2, peaks=peaks)})
    ends = [("cuda", FINISHED, write_run(tmp_path / "cuda", memory=[counted]))]
    table = render_terminal(compare_runs("tiny.yaml", ends)).split("\n\n")[-1].splitlines()
    assert table[0] == "Memory of one step at its fullest"
    assert table[1].split() == ["lane", "on", "total", "parameters", "activations"]
    assert [line.split() for line in table[3:]] == [
        ["cuda", "cuda:0", "3.0", "MiB", "2.0", "MiB", "1.0", "MiB"],
        ["cuda", "cpu", "1.0", "MiB", "1.0", "MiB", "0.0", "MiB"],
    ]


def test_a_report_of_lanes_that_all_failed_says_why(tmp_path: Path) -> None:
    ends = [("cpu", LaneEnd("refused", "no such thing", 0.1), tmp_path)]
    comparison = compare_runs("tiny.yaml", ends)
    assert comparison.exit_code == 2
    assert "No lane finished." in render_markdown(comparison)
    assert render_terminal(comparison).splitlines()[-1].split(maxsplit=2) == [
        "cpu",
        "refused",
        "no such thing",
    ]


def test_text_from_records_is_no_markup_in_a_report(tmp_path: Path) -> None:
    environment = {"cpu": "<img src=x> | [a](b)\x1b[2J", "memory_bytes": 10**400, "packages": "odd"}
    text = render_markdown(compared(tmp_path, cpu={"environment": environment, "threads": None}))
    assert r"&lt;img src=x&gt; \| \[a\](b) \[2J" in text
    assert "\x1b" not in text


# --- turns --------------------------------------------------------------------------------------


def test_lanes_take_turns_and_every_other_round_goes_backwards() -> None:
    turns = Turns([Lane("a"), Lane("b"), Lane("c")], repeats=3)
    order = ""
    for lane, _ in turns:
        turns.took(lane, FINISHED, Path())
        order += lane.name
    assert order == "abccbaabc"


def test_a_lane_that_did_not_finish_has_no_further_turns() -> None:
    turns = Turns([Lane("a"), Lane("b")], repeats=3)
    order = ""
    for lane, _ in turns:
        turns.took(lane, LaneEnd("failed", "full", 1.0) if lane.name == "b" else FINISHED, Path())
        order += lane.name
    assert order == "abaa"


def test_the_time_left_is_told_once_every_lane_has_run() -> None:
    turns = Turns([Lane("a"), Lane("b")], repeats=2)
    said = []
    for lane, repeat in turns:
        said.append(turns.progress(lane, repeat))
        turns.took(lane, LaneEnd("finished", None, 10.0 if lane.name == "a" else 30.0), Path())
    assert said == [
        "run 1 of 4: a, repeat 1 of 2",
        "run 2 of 4: b, repeat 1 of 2",
        "run 3 of 4, about 40 s left: b, repeat 2 of 2",
        "run 4 of 4, about 10 s left: a, repeat 2 of 2",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ladder", "--vary", "precision=fp32,bf16"], "--ladder and --vary: expected one of them"),
        (["--vary", "batch.micro=8,7"], "batch.micro"),
        (["--vary", "batch.mirco=8"], "batch.mirco"),
        (["--repeats", "0"], "--repeats"),
    ],
)
def test_a_comparison_that_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, words: list[str], message: str
) -> None:
    quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
    command = ["compare", str(quickstart), "--backends", "null", "--out", str(tmp_path / "out"), *words]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


# --- the command, with stubs for lanes ------------------------------------------------------


def stub(behaviours: dict[str, str]) -> Any:
    def command(lane: Lane, spec: Path, directory: Path, overrides: Sequence[str]) -> list[str]:
        return [sys.executable, str(STUB), behaviours[lane.name], str(directory)]

    return command


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.touch()
    return path


@pytest.mark.slow
def test_compare_trains_every_lane_and_leaves_a_report(
    spec: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    behaviours = {"cpu": "trains", "deepspeed:2": "trains-a-little-worse", "cuda": "refuses"}
    comparison = compare(spec, parse_lanes(list(behaviours)), out, command=stub(behaviours))

    assert [lane.outcome for lane in comparison.lanes] == ["finished", "finished", "refused"]
    assert comparison.lanes[2].reason == "error: backend 'cuda' cannot run here no GPU"
    assert comparison.exit_code == 0
    assert Comparison.model_validate_json((out / "report.json").read_text()) == comparison
    assert (out / "report.md").read_text() == render_markdown(comparison)
    assert compare_lanes("tiny.yaml", stored_lanes([str(out)])) == comparison
    assert (out / "lanes" / "deepspeed-2" / "run-1" / "record.json").exists()
    assert "starting" in (out / "lanes" / "cuda" / "run-1.log").read_text()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "run 2 of 3: deepspeed:2, repeat 1 of 1; its output goes to" in captured.err


@pytest.mark.slow
def test_a_failed_lane_is_a_row_and_the_others_go_on(spec: Path, tmp_path: Path) -> None:
    behaviours = {"cpu": "fails", "cuda": "crashes", "null": "leaves-nothing", "mps": "trains"}
    comparison = compare(spec, parse_lanes(list(behaviours)), tmp_path / "out", command=stub(behaviours))
    assert [lane.outcome for lane in comparison.lanes] == ["failed", "failed", "failed", "finished"]
    reasons = [str(lane.reason) for lane in comparison.lanes]
    assert reasons[0] == "the disk is full"
    assert reasons[1] == "ended by SIGKILL: going well"
    assert reasons[2].endswith("run-1: no such file; expected the record of a run")
    assert comparison.reference == "mps"
    assert comparison.exit_code == 1


def test_an_existing_folder_and_a_missing_spec_are_refused_before_anything_starts(
    spec: Path, tmp_path: Path
) -> None:
    with pytest.raises(RequestError, match="exists already; choose another --out"):
        compare(spec, [Lane("cpu")], tmp_path, command=stub({}))
    with pytest.raises(RequestError, match=r"missing\.yaml: no such file; expected a spec"):
        compare(tmp_path / "missing.yaml", [Lane("cpu")], tmp_path / "out", command=stub({}))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_comparison_that_is_ended_leaves_no_lane_behind(
    spec: Path, tmp_path: Path, number: signal.Signals
) -> None:
    program = (
        "import sys; from pathlib import Path; from xtrain.compare import compare; "
        "from xtrain.lanes import Lane\n"
        "def stub(lane, spec, out, overrides): return [sys.executable, sys.argv[1], 'waits', str(out)]\n"
        "compare(Path(sys.argv[2]), [Lane('cpu')], Path(sys.argv[3]), command=stub)"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, str(STUB), str(spec), str(out)]
    pid_file = out / "lanes" / "cpu" / "run-1" / "pid"
    with running(command, stderr=subprocess.PIPE) as process:
        while process.poll() is None and not (pid_file.exists() and pid_file.read_text()):
            time.sleep(0.05)
        lane = int(pid_file.read_text())
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(lane, 0)
    assert f"cut off; to see what has finished: xtrain report {out} --out {out}\n" in said
    (row,) = stored_lanes([str(out)])
    assert (row.outcome, row.reason) == ("failed", "the comparison ended before its first run did")


@pytest.mark.slow
def test_the_reason_of_a_silent_or_talkative_lane_is_short(tmp_path: Path) -> None:
    silent = run_lane([sys.executable, "-c", "raise SystemExit(1)"], tmp_path / "a.log")
    assert (silent.outcome, silent.reason) == ("failed", "it printed nothing")
    program = "print('noise'); print('error: ' + 'x' * 9999); raise SystemExit(75)"
    talkative = run_lane([sys.executable, "-c", program], tmp_path / "b.log")
    assert str(talkative.reason).startswith("interrupted: error: xxx")
    assert len(str(talkative.reason)) < 600
