"""A run that went on in another directory keeps its place there, also before its first save."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import xtrain.run
from tests.small_runs import SPEC, checkpoints, metrics, run, steps
from xtrain import registry
from xtrain.choose import Choice
from xtrain.contract import Job, Memory, OutOfMemory
from xtrain.errors import EXIT_DONE, EXIT_FAILED
from xtrain.fitting import HISTORY, read_history
from xtrain.launching.launch import Ended
from xtrain.loop import Loop
from xtrain.records.metrics import StepRecord
from xtrain.records.rundir import write_json
from xtrain.request import Request
from xtrain.signals import StopRequest
from xtrain.spec import load_spec
from xtrain.work import work

ALL = list(range(1, 13))
FULL = OutOfMemory("cpu", Memory(None, None, None), "step")


def whole(folder: Path) -> Path:
    """A run of 12 updates, saved after every fourth."""
    out = folder / "whole"
    assert run(folder, "--out", out, backend="cpu").exit_code == 0
    return out


def moved(folder: Path, first: Path) -> Path:
    """It went on elsewhere from update 8, and was stopped before it had saved anything."""
    out = folder / "moved"
    start = first / "checkpoints" / "step-00000008"
    stopped = run(folder, "--resume", start, "--out", out, "--stop-after", 8, backend="cpu")
    assert stopped.exit_code == 0
    assert f"--resume {out}" in stopped.stderr
    assert checkpoints(out) == []
    return out


def losses(out: Path) -> list[float | None]:
    return [line.loss for line in metrics(out)]


def test_stopped_before_its_first_save_it_goes_on_from_where_it_began(tmp_path: Path) -> None:
    first = whole(tmp_path)
    out = moved(tmp_path, first)
    for last in (8, 12):  # the first of them saves nothing either
        result = run(tmp_path, "--resume", out, "--stop-after", last, backend="cpu")
        assert f"resumed from {first}/checkpoints/step-00000008, after step 8" in result.stderr
    assert steps(out) == ALL
    assert losses(out) == losses(first)
    assert "step-00000012" in run(tmp_path, "--resume", out, backend="cpu").stderr


def test_where_that_is_gone_it_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    first = whole(tmp_path)
    out = moved(tmp_path, first)
    shutil.rmtree(first / "checkpoints" / "step-00000008")
    result = run(tmp_path, "--resume", out, backend="cpu")
    assert result.exit_code == 2
    assert f"{out} has no checkpoint yet and began from another run's" in result.stderr
    assert f"{first}/checkpoints/step-00000008: not there" in result.stderr
    assert steps(out) == ALL[:8]


@pytest.mark.parametrize("elsewhere", [True, False], ids=["elsewhere", "in place"])
def test_the_printed_command_insists_on_what_changed_until_that_is_saved(
    tmp_path: Path, elsewhere: bool
) -> None:
    first = whole(tmp_path)
    out = tmp_path / "moved" if elsewhere else first
    words: list[str | Path] = ["--resume", first / "checkpoints" / "step-00000008", "--allow-changed"]
    words += ["--out", out] if elsewhere else []
    lr: dict[str, Any] = {"optimizer__lr": 1e-3, "backend": "cpu"}
    unsaved = run(tmp_path, *words, "--stop-after", 8, **lr)
    assert unsaved.stderr.splitlines()[-1].endswith(f"--resume {out} --allow-changed")
    assert run(tmp_path, "--resume", out, "--stop-after", 9, **lr).exit_code == 2
    saved = run(tmp_path, "--resume", out, "--allow-changed", "--stop-after", 9, **lr)
    assert saved.stderr.splitlines()[-1].endswith(f"--resume {out}")
    assert run(tmp_path, "--resume", out, **lr).exit_code == 0


def train(folder: Path, **where: Any) -> int:
    """Under `memory: auto`, in this process, as a worker does it."""
    (folder / "spec.yaml").write_text(f"{SPEC}memory: auto\n")
    request = Request(folder / "spec.yaml", "cpu", **where)
    spec = load_spec(request.spec_path, resumes=True)
    with StopRequest() as stop:
        return work(request, spec, Choice(registry.load("cpu"), ""), Job(), stop)


def full_once(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, out: Path) -> None:
    """The device is full the first time that this is called for the run in `out`."""
    honest = getattr(owner, method)

    def called(*given: Any, **named: Any) -> Any:
        if not read_history(out):
            raise FULL
        return honest(*given, **named)

    monkeypatch.setattr(owner, method, called)


@pytest.mark.parametrize("elsewhere", [True, False], ids=["elsewhere", "in place"])
@pytest.mark.parametrize("moment", ["start", "step"])
def test_with_less_memory_it_goes_on_from_the_same_step(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    elsewhere: bool,
    moment: str,
) -> None:
    first = whole(tmp_path)
    expected: list[StepRecord] = metrics(first)
    out = tmp_path / "auto" if elsewhere else first
    owner, method = (type(registry.load("cpu")), "start") if moment == "start" else (Loop, "_step")
    full_once(monkeypatch, owner, method, out)
    start = first / "checkpoints" / "step-00000004"
    assert train(tmp_path, resume=start, out=out if elsewhere else None) == 0
    assert len(read_history(out)) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resumed from")]
    assert told[-1] == f"resumed from {start}, after step 4"
    assert steps(out) == ALL
    assert checkpoints(out) == ([8, 12] if elsewhere else [4, 8, 12])
    assert losses(out) == pytest.approx([line.loss for line in expected], rel=1e-5)


@pytest.mark.parametrize("began", [True, False])
def test_the_launcher_stays_with_the_named_checkpoint_until_the_run_has_gone_back_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, began: bool
) -> None:
    first = whole(tmp_path)
    write_json(first / HISTORY, {"rung": "a", "lower": ["b"]})
    asked: list[str] = []

    def start_workers(arguments: list[str], *_: Any, **__: Any) -> Ended:
        asked.append(arguments[arguments.index("--resume") + 1])
        if len(asked) > 1:
            return Ended(EXIT_DONE, "")
        if began:
            write_json(first / "resolved.json", {})
        return Ended(EXIT_FAILED, "rank 0 was killed by SIGKILL", "yes")

    monkeypatch.setattr(xtrain.run, "start_workers", start_workers)
    (tmp_path / "spec.yaml").write_text(f"{SPEC}memory: auto\n")
    start = first / "checkpoints" / "step-00000004"
    assert xtrain.run.run(Request(tmp_path / "spec.yaml", "cpu", resume=start)) == EXIT_DONE
    assert asked == [str(start), str(first if began else start)]
