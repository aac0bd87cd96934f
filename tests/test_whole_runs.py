"""Whole runs on the backend that trains nothing: the loop, the record, the guards, the exit codes."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import SPEC, checkpoints, metrics, run, steps
from xtrain.checkpoints.format import complete_checkpoints
from xtrain.checkpoints.inventory import damage
from xtrain.checkpoints.tensorfile import TensorFile
from xtrain.records.record import load_record
from xtrain.request import this_program

null: Any = importlib.import_module("xtrain.backends.null.backend")


def test_a_run_leaves_a_complete_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tmp_path, "--out", out, train__eval_every=5)
    assert result.exit_code == 0
    found = sorted(path.name for path in out.iterdir())
    assert found == ["checkpoints", "lock", "metrics.jsonl", "record.json", "resolved.json", "spec.yaml"]
    assert (out / "spec.yaml").read_text() == SPEC
    resolved = json.loads((out / "resolved.json").read_text())
    assert (resolved["backend"], resolved["world"]) == ("null", 1)
    assert resolved["overrides"] == ["train.eval_every=5"]
    assert resolved["spec"]["train"]["eval_every"] == 5
    assert steps(out) == list(range(1, 13))
    assert checkpoints(out) == [4, 8, 12]


def test_what_an_engine_decided_when_it_saw_the_model_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(backend: Any, resolved: Any, model: Any, job: Any) -> Any:
        engine = null.NullEngine()
        engine.resolved = replace(resolved, settings={"largest": 7}, files={"own.json": {"largest": 7}})
        return engine

    monkeypatch.setattr(null.NullBackend, "start", start)
    out = tmp_path / "out"
    assert run(tmp_path, "--out", out).exit_code == 0
    assert json.loads((out / "own.json").read_text()) == {"largest": 7}
    assert json.loads((out / "resolved.json").read_text())["settings"] == {"largest": 7}


def test_the_record_says_what_the_metrics_say(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, "--out", out, train__eval_every=5)
    record, lines = load_record(out), metrics(out)
    assert (record.status, record.failure, record.backend, record.world) == ("done", None, "null", 1)
    assert (record.totals.steps, record.totals.tokens, record.totals.skipped) == (12, 12 * 4 * 16, 0)
    assert (record.loss.first, record.loss.last) == (lines[0].loss, lines[-1].loss)
    assert lines[-1].loss == pytest.approx(null.scripted_loss(11))
    assert [line.step for line in lines if line.eval_loss is not None] == [5, 10, 12]
    assert record.eval is not None
    assert record.eval.last_step == 12
    assert record.eval.last == pytest.approx(null.FIRST_LOSS)
    assert record.data.hash
    assert record.data.portable
    assert record.spec["optimizer"]["betas"] == [0.9, 0.95]  # type: ignore[index, call-overload]
    assert record.environment["python"]
    assert record.memory[0].rss is not None
    assert record.memory[0].live is None


def test_a_run_is_never_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, "--out", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = run(tmp_path, "--out", out, train__steps=3)
    assert again.exit_code == 2
    assert f"{out} already holds a run; choose another --out" in again.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_stop_after_stops_saved_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tmp_path, "--out", out, "--stop-after", 5)
    assert result.exit_code == 0
    assert load_record(out).status == "stopped"
    assert steps(out) == [1, 2, 3, 4, 5]
    assert checkpoints(out) == [4, 5]
    spec = tmp_path / "spec.yaml"
    program = shlex.join(this_program())
    assert f"go on with: {program} run {spec} --backend null --resume {out}\n" in result.stderr


def signal_in_step(monkeypatch: pytest.MonkeyPatch, index: int, number: signal.Signals) -> None:
    """This process is sent a signal in the middle of the update with this 0-based index."""
    honest = null.scripted_loss

    def interrupted(step: int) -> Any:
        if step == index:
            os.kill(os.getpid(), number)
        return honest(step)

    monkeypatch.setattr(null, "scripted_loss", interrupted)


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits_with_75(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: signal.Signals,
    record_property: Callable[[str, object], None],
) -> None:
    signal_in_step(monkeypatch, 6, asked)
    before = signal.getsignal(asked)
    out = tmp_path / "out"
    result = run(tmp_path, "--out", out)
    assert result.exit_code == 75
    assert f"{asked.name}: finishing the step and saving; Ctrl-C again leaves at once" in result.stderr
    assert load_record(out).status == "interrupted"
    assert (steps(out)[-1], checkpoints(out)[-1]) == (7, 7)
    assert signal.getsignal(asked) is before
    record_property("signals in the middle of a step", 1)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_signal_in_the_middle_of_a_save_costs_no_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    background: str,
    record_property: Callable[[str, object], None],
) -> None:
    honest, sent = TensorFile.write, list[str]()

    def interrupted(self: TensorFile, key: str, value: Any, begin: int = 0) -> int:
        written = honest(self, key, value, begin)
        if len(sent) < 2:
            sent.append(key)
        if len(sent) == 2:
            sent.append("a signal, between two tensors")
            os.kill(os.getpid(), signal.SIGTERM)
        return written

    monkeypatch.setattr(TensorFile, "write", interrupted)
    out = tmp_path / "out"
    options: dict[str, Any] = {"train__steps": 100_000, "checkpoint__background": background}
    result = run(tmp_path, "--out", out, backend="cpu", **options)
    assert result.exit_code == 75
    assert "SIGTERM: finishing the step and saving" in result.stderr
    assert checkpoints(out)[0] == 4  # the save that was under way
    assert checkpoints(out)[-1] == steps(out)[-1] > 4
    assert all(not damage(one) for one in complete_checkpoints(out / "checkpoints"))
    record_property("signals in the middle of a save", 1)
    record_property("steps lost to a signal", steps(out)[-1] - checkpoints(out)[-1])


def test_a_signal_in_the_last_step_is_a_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal_in_step(monkeypatch, 11, signal.SIGTERM)
    assert run(tmp_path, "--out", tmp_path / "out").exit_code == 0
    assert load_record(tmp_path / "out").status == "done"


# The null engine's norm falls from 1; it is above 0.9 in the first five steps.
SKIPS_FIVE = "{grad_norm: 0.9}"


def test_skipped_steps_are_counted_logged_and_shown(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tmp_path, "--out", out, stability=SKIPS_FIVE, log__every_steps=1)
    assert result.exit_code == 0
    assert [line.skipped for line in metrics(out)] == [True] * 5 + [False] * 7
    assert load_record(out).totals.skipped == 5
    shown = [line for line in result.stderr.splitlines() if line.startswith("step ")]
    assert [", skipped," in line for line in shown] == [True] * 5 + [False] * 7


@pytest.mark.parametrize("every_steps", [1, 10])
def test_too_many_skips_end_the_run_with_every_step_written_down(tmp_path: Path, every_steps: int) -> None:
    out = tmp_path / "out"
    stability = "{grad_norm: 0.9, stop_after: 4}"
    result = run(tmp_path, "--out", out, stability=stability, log__every_steps=every_steps)
    assert result.exit_code == 1
    assert (
        "error: 4 steps in a row were skipped (stability.stop_after is 4); the last because the gradient"
        in (result.stderr)
    )
    assert "Traceback" not in result.stderr
    record = load_record(out)
    assert (record.status, record.totals.steps, record.totals.skipped) == ("failed", 4, 4)
    assert record.failure is not None
    assert record.failure.startswith("4 steps in a row were skipped")


def test_skips_in_a_row_go_on_counting_after_a_resume(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stability = "{grad_norm: 0.9, stop_after: 4}"
    assert run(tmp_path, "--out", out, "--stop-after", 3, stability=stability).exit_code == 0
    assert run(tmp_path, "--resume", out, stability=stability).exit_code == 1
    assert steps(out) == [1, 2, 3, 4]


def test_an_error_that_nobody_foresaw_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(step: int) -> float:
        if step == 3:
            raise ZeroDivisionError("a bug")
        return 1.0

    monkeypatch.setattr(null, "scripted_loss", broken)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, "--out", tmp_path / "out")
    record = load_record(tmp_path / "out")
    assert (record.status, record.failure) == ("failed", "ZeroDivisionError: a bug")


def test_overflows_at_the_floor_end_a_run_on_a_real_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTRAIN_EMULATED_FP16", "1")
    out = tmp_path / "out"
    precision = f"{{dtype: fp16, loss_scale: {2.0**60}}}"
    result = run(tmp_path, "--out", out, backend="cpu", precision=precision)
    assert result.exit_code == 1
    assert "fp16 gradients overflowed in 5 steps in a row although the loss scale is at its floor" in (
        result.stderr
    )
    record = load_record(out)
    assert record.status == "failed"
    assert record.totals.skipped == record.totals.steps >= 5


@pytest.mark.slow
def test_the_null_backend_needs_neither_torch_nor_deepspeed(tmp_path: Path) -> None:
    """Training, checkpoints and resume included."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)
    out = tmp_path / "out"
    program = (
        "import sys; from xtrain.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print('heavy', sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    )
    for words in (["--out", out, "--stop-after", "5"], ["--resume", out]):
        command = [sys.executable, "-c", program, "run", str(spec), "--backend", "null", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "heavy []" in done.stdout
    assert steps(out) == list(range(1, 13))


def test_a_loss_that_is_no_number_ends_the_run_before_anything_is_saved(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tmp_path, "--out", out, backend="cpu", optimizer__lr="1e38", schedule="{name: constant}")
    assert result.exit_code == 1
    assert "error: the loss of step " in result.stderr
    assert "is nan: the training diverged" in result.stderr
    assert "set stability: {}" in result.stderr
    assert checkpoints(out) == []
    assert load_record(out).status == "failed"


def test_with_stability_such_steps_are_skipped_instead(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sets = {"optimizer__lr": "1e38", "schedule": "{name: constant}", "stability": "{}"}
    result = run(tmp_path, "--out", out, backend="cpu", **sets)
    assert result.exit_code == 0
    assert load_record(out).totals.skipped > 0
