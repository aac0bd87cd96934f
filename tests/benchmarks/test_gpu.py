"""`make gpu` without a GPU: its programs with tiny sizes on the CPU, and what it makes of failures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

from benchmarks.gpu_lanes import Bench, Row, _last_words, _parameters, planned_bytes
from benchmarks.gpu_parts import GPT2, LARGE, PARTS, RUNG, Part, ends, rows_of, rungs
from benchmarks.gpu_report import markdown, told
from benchmarks.overhead import ROOT
from tests.sample_runs import sample_record
from xtrain import registry
from xtrain.models.presets import PRESETS
from xtrain.plan.layout import DEVICE, Planned, peaks
from xtrain.plan.step import preset_step
from xtrain.spec.tree import Spec

MACHINE = {"packages": {"torch": "2"}, "cpu": "c", "platform": "p", "python": "3", "git_commit": "abc"}
REPORT = {"environment": MACHINE, "date": "d", "command": "x", "seconds": 1.0, "device": "a GPU"}
ABOUT = {part.name: part.about for part in PARTS}


def bench(folder: Path, seconds: float = 60, gpu_name: str = "") -> Bench:
    return Bench("cpu", gpu_name, folder, perf_counter() + seconds, folder / "log")


def test_a_lane_that_takes_too_long_is_ended_with_all_it_started_and_tells_where_it_stood(
    tmp_path: Path,
) -> None:
    program = "import subprocess\ndef stuck(): subprocess.run(['sleep', '60'])\nprint('so far')\nstuck()"
    ended = bench(tmp_path).call(["-c", program], limit_seconds=2)
    assert ended.problem == "not done within 2 s"
    assert ended.seconds < 20
    assert ended.output.startswith("so far\n")
    assert " in stuck\n" in ended.output


def test_all_that_lanes_print_is_in_one_log_with_their_commands(tmp_path: Path) -> None:
    one = bench(tmp_path)
    assert one.call(["-c", "print('first')"], 20).output == "first\n"
    assert one.call(["-c", "print('second'); raise OSError('no room')"], 20).problem == "OSError: no room"
    log = one.log.read_text()
    assert log.startswith("=== -c print('first')\nfirst\n=== done, after ")
    assert "\nsecond\nTraceback (most recent call last):\n" in log
    assert "\n=== OSError: no room, after " in log


def test_a_lane_without_time_left_is_not_begun(tmp_path: Path) -> None:
    ended = bench(tmp_path, seconds=1).call(["-c", "open('begun', 'w')"], limit_seconds=5)
    assert ended.problem.startswith("left out")
    assert not (ROOT / "begun").exists()


def test_a_lane_whose_result_cannot_be_read_is_a_row_with_the_reason(tmp_path: Path) -> None:
    def nothing_there(output: str) -> dict[str, Any]:
        raise KeyError("tokens")

    row = bench(tmp_path).row("speed", "plain", ["-c", "pass"], 20, nothing_there)
    assert row.outcome == "what it left cannot be read: KeyError: 'tokens'"


def test_a_part_that_breaks_off_leaves_its_rows_and_the_reason(tmp_path: Path) -> None:
    def breaks_off(bench: Bench) -> Iterator[Row]:
        yield Row("speed", "first", "done")
        raise OSError("no room")

    rows = list(rows_of(Part("speed", "", 1, breaks_off), bench(tmp_path)))
    assert [row.outcome for row in rows] == ["done", "failed: OSError: no room"]


def test_every_part_has_its_share_of_the_time_whatever_those_before_it_take() -> None:
    over = ends(PARTS, 540)
    assert over == sorted(over)
    assert over[-1] == 540
    for part, end, before in zip(PARTS, over, [0.0, *over], strict=False):
        assert end - before == pytest.approx(part.seconds)
    assert ends(PARTS[-1:], 100) == [100]


def planned(changes: dict[str, Any]) -> int:
    """Bytes on the device, as the planner sees a step of GPT-2 Large."""
    spec = Spec.model_validate({**RUNG.spec(), **changes})
    backend: Any = registry.load("cuda")
    assert isinstance(backend, Planned)
    layout = backend.layout(spec, 1, DEVICE)
    assert layout is not None
    return peaks(preset_step(spec, spec.accumulation(1)), layout)[layout.home].total


def test_the_last_rung_with_all_blocks_on_the_gpu_is_planned_at_a_sixth_of_the_first() -> None:
    sizes = [planned(changes) for _, changes in rungs(RUNG)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-2] <= sizes[0] / 6


def test_a_lane_that_fails_tells_its_message_on_one_line() -> None:
    output = "step 1\nerror: spec.yaml has 1 problem\n  1:2: no such thing\n"
    assert _last_words(output) == "error: spec.yaml has 1 problem 1:2: no such thing"
    assert _last_words("Traceback\n  ...\nKeyError: 1\n") == "KeyError: 1"
    failed = "[rank0]: torch.AcceleratorError: CUDA error: bad\nCompile with `TORCH_USE_CUDA_DSA`.\n"
    assert _last_words(f"Traceback\n{failed}").startswith("[rank0]: torch.AcceleratorError: CUDA error: bad")
    assert _last_words("") == "failed without a word"


@pytest.mark.parametrize(("load", "preset"), [(GPT2, "gpt2"), (LARGE, "gpt2-large")])
def test_the_models_are_those_of_the_presets(load: object, preset: str) -> None:
    named = PRESETS[preset]
    assert load in (GPT2, LARGE)
    size = GPT2 if load is GPT2 else LARGE
    assert (size.layers, size.hidden, size.heads) == (named.layers, named.hidden, named.heads)
    assert _parameters(size) == pytest.approx({"gpt2": 124e6, "gpt2-large": 774e6}[preset], rel=0.01)


def test_utilisation_is_that_of_the_named_gpu_and_unknown_for_others(tmp_path: Path) -> None:
    known = bench(tmp_path, gpu_name="NVIDIA H100 80GB HBM3").mfu(124_000_000, 12, 768, GPT2, 500_000)
    assert known == pytest.approx(500_000 * (6 * 124e6 + 12 * 12 * 768 * 1024) / 989e12)
    assert bench(tmp_path, gpu_name="something else").mfu(124_000_000, 12, 768, GPT2, 500_000) is None


def test_planned_bytes_are_those_of_the_device_and_not_of_the_host() -> None:
    record = sample_record()
    assert planned_bytes(record, "cuda") is None
    said = {"cuda:0": {"parameters": 3, "logits": 4}, "cpu": {"optimizer": 100}}
    assert planned_bytes(record.model_copy(update={"predicted": {"peak_bytes": said}}), "cuda") == 7


def test_page_has_rows_with_figures_and_rows_with_reasons() -> None:
    rows = [
        Row(
            "ladder",
            "plain",
            "done",
            {"tokens_per_second": 10.0, "peak_bytes": 2**30, "planned_bytes": 2**29},
        ),
        Row("ladder", "lean", "not done within 60 s"),
        Row("profile", "ours", "done", {"busy": 0.97, "kernels": [["gemm<a|b>", 2.0, 1.5]]}),
    ]
    page = markdown(REPORT, ABOUT, rows)
    assert "| lane | tokens/s | peak, GiB | planned, GiB | outcome |" in page
    assert "| plain | 10 | 1.00 | 0.50 | done |" in page
    assert "| lean | - | - | - | not done within 60 s |" in page
    assert "- ladder, plain: -50.0%" in page
    assert "| ours | 97.0% | done |" in page
    assert "| `gemm<a/b>` | 2 | 1.50 |" in page
    assert told(rows[0]) == "ladder, plain: done; tokens/s 10; peak, GiB 1.00; planned, GiB 0.50"


@pytest.mark.slow
def test_a_trial_on_the_cpu_trains_the_same_beside_the_plain_loop(tmp_path: Path) -> None:
    words = [
        "--device",
        "cpu",
        "--parts",
        "speed",
        "checkpoint pause",
        "profile",
        "--seconds",
        "300",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("gpu-*-trial.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["outcome"].split(":")[0] for row in rows] == ["left out", "done", "done", "done", "done"]
    plain, ours, pause, profile = (row["figures"] for row in rows[1:])
    assert ours["loss_last"] == pytest.approx(plain["loss_last"], rel=1e-3)
    assert ours["speed_share"] == pytest.approx(ours["tokens_per_second"] / plain["tokens_per_second"])
    assert pause["pause_seconds"] > 0
    assert 0 < profile["busy"] < 2
    assert any(name == "aten::mm" for name, *_ in profile["kernels"])
    assert path.with_suffix(".md").exists()
    assert path.with_suffix(".log").read_text().count("\n=== done, after ") == 4
