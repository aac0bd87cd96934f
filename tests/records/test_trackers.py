"""Trackers: what they write is read back by their own libraries, and their failures stop nothing."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner

import xtrain.run  # before a test hides what is installed  # noqa: F401
from tests.sample_runs import sample_steps
from xtrain.cli import main
from xtrain.errors import RequestError
from xtrain.records.metrics import StepRecord, read_metrics
from xtrain.records.trackers import TRACKERS, Trackers, figures_of, open_trackers, require_installed
from xtrain.spec.tree import Log

ROOT = Path(__file__).parents[2]

SPEC = """\
model: {preset: gpt2-nano}
data: {source: synthetic, tokens: 20_000, seq_len: 16}
batch: {global: 4}
train: {steps: 6}
optimizer: {lr: 1e-3}
schedule: {warmup: 2}
log: {every_steps: 2}
"""


class Failing:
    """Works for `good` updates, then raises at each call."""

    name = "failing"

    def __init__(self, good: int) -> None:
        self.good = good
        self.calls: list[str] = []

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.calls.append(f"log {step}")
        if step > self.good:
            raise OSError(f"no space left\nat step {step}")

    def close(self) -> None:
        self.calls.append("close")
        raise OSError("still no space left")


class Keeping:
    """Keeps what it is sent."""

    name = "keeping"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.closed = False

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.closed = True


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: tag -> step -> value."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard (the dev extra)"
    )
    events = accumulator.EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def float32(values: Mapping[int, float]) -> Any:
    return pytest.approx(values, rel=1e-6)


# --- what is sent --------------------------------------------------------------------------------


def test_figures_are_what_is_known_of_an_update() -> None:
    record = StepRecord(
        step=3,
        loss=None,
        lr=1e-3,
        grad_norm=2.5,
        tokens=100,
        seconds=0.5,
        skipped=True,
        spans={"forward": 0.2},
    )
    assert figures_of(record) == {
        "lr": 1e-3,
        "grad_norm": 2.5,
        "tokens": 100.0,
        "seconds": 0.5,
        "skipped": 1.0,
        "spans/forward": 0.2,
    }


def test_tensorboard_shows_every_update(tmp_path: Path) -> None:
    steps = sample_steps(20)
    trackers = open_trackers(["tensorboard"], tmp_path, {}, say=pytest.fail)
    for record in steps:
        trackers.log(record)
    trackers.close()
    shown = scalars(tmp_path)
    assert shown["loss"] == float32({s.step: s.loss for s in steps if s.loss is not None})
    assert shown["lr"] == float32({s.step: s.lr for s in steps})
    assert list(shown["eval_loss"]) == [20]
    assert list(shown["spans/forward"]) == [6]


def test_what_was_logged_after_the_checkpoint_that_a_run_goes_on_from_is_not_shown(tmp_path: Path) -> None:
    before, after = sample_steps(6), sample_steps(5, loss_factor=2.0)[3:]
    for records, first_step in ((before, 1), (after, 4)):
        trackers = open_trackers(["tensorboard"], tmp_path, {}, pytest.fail, first_step)
        for record in records:
            trackers.log(record)
        trackers.close()
    expected = {s.step: s.loss for s in (*before[:3], *after) if s.loss is not None}
    assert scalars(tmp_path)["loss"] == float32(expected)


# --- failures ------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_reported_once_and_closed_and_the_others_go_on() -> None:
    said: list[str] = []
    failing, keeping = Failing(good=2), Keeping()
    trackers = Trackers([failing, keeping], said.append)
    for record in sample_steps(5):
        trackers.log(record)
    trackers.close()
    assert said == ["failing is switched off: OSError: no space left; training goes on"]
    assert failing.calls == ["log 1", "log 2", "log 3", "close"]
    assert keeping.steps == [1, 2, 3, 4, 5]
    assert keeping.closed


def test_a_tracker_that_fails_at_the_end_is_reported() -> None:
    said: list[str] = []
    trackers = Trackers([Failing(good=5)], said.append)
    trackers.close()
    trackers.close()
    assert said == ["failing is switched off: OSError: still no space left; training goes on"]


def test_an_interrupt_is_not_a_failure_of_the_tracker() -> None:
    class Interrupted(Keeping):
        def log(self, step: int, figures: Mapping[str, float]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()], pytest.fail).log(sample_steps(1)[0])


def test_a_tracker_that_cannot_start_is_reported(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    said: list[str] = []
    trackers = open_trackers(["tensorboard"], tmp_path, {}, said.append)
    trackers.log(sample_steps(1)[0])
    trackers.close()
    assert len(said) == 1
    assert said[0].startswith("tensorboard is switched off: FileExistsError")


# --- what is installed ---------------------------------------------------------------------------


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package is found any more; what was imported stays."""
    monkeypatch.setattr(sys, "path", [p for p in sys.path if not p.endswith("site-packages")])


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_refused_before_the_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC)
    words = ["run", str(tmp_path / "spec.yaml"), "--backend", "null", "--set", f"log.trackers=[{name}]"]
    result = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: log.trackers: found {name}, which is not installed; "
        f"run: pip install 'xtrain[{name}]', or leave it out\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_installed")
def test_open_trackers_refuses_too_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not installed"):
        open_trackers(["wandb"], tmp_path, {}, pytest.fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_asking_what_is_installed_imports_no_tracker() -> None:
    code = (
        "import sys; from xtrain.records.trackers import require_installed\n"
        "require_installed(['tensorboard'])\n"
        "print([m for m in ('torch', 'tensorboard', 'wandb') if m in sys.modules])"
    )
    require_installed(["tensorboard"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_tracker_of_the_spec_is_an_extra() -> None:
    names = set(get_args(get_args(Log.model_fields["trackers"].annotation)[0]))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert names == set(TRACKERS)
    assert names <= set(extras)


# --- whole runs ----------------------------------------------------------------------------------


def train(tmp_path: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """`xtrain run` on scripted losses; without --resume into tmp_path/out."""
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC)
    where = [] if "--resume" in words else ["--out", str(tmp_path / "out")]
    kept = {k: v for k, v in os.environ.items() if k != "NETRC" and not k.startswith("WANDB_")}
    return subprocess.run(
        [sys.executable, "-m", "xtrain", "run", str(spec), "--backend", "null", *where, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,  # on a terminal wandb would ask for a key
        timeout=300,
        env={**kept, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", **environ},
        check=False,
    )


def with_trackers(*names: str) -> Sequence[str]:
    return ("--set", f"log.trackers=[{', '.join(names)}]")


def written_losses(run: Path) -> dict[int, float]:
    return {record.step: record.loss for record in read_metrics(run / "metrics.jsonl") if record.loss}


def wandb_losses(run: Path) -> dict[int, float]:
    """The history in a wandb offline file: records of (checksum, length, type) in front of a message."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs wandb (the dev extra)")
    (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
    data, at, losses = path.read_bytes(), 7, {}
    assert len(data) < 1 << 15, "longer than one block: records may be split"
    while at < len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1, "a split record"
        record = pb.Record.FromString(data[at + 7 : at + 7 + length])
        if record.WhichOneof("record_type") == "history":
            values = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            losses[values["_step"]] = values["loss"]
        at += 7 + length
    return losses


@pytest.mark.slow
def test_a_run_writes_tensorboard_events_and_goes_on_with_them_when_resumed(tmp_path: Path) -> None:
    first = train(tmp_path, *with_trackers("tensorboard"), "--stop-after", "3")
    assert first.returncode == 0, first.stderr
    assert list(scalars(tmp_path / "out")["loss"]) == [1, 2, 3]
    second = train(tmp_path, *with_trackers("tensorboard"), "--resume", str(tmp_path / "out"))
    assert second.returncode == 0, second.stderr
    assert scalars(tmp_path / "out")["loss"] == float32(written_losses(tmp_path / "out"))
    assert list(written_losses(tmp_path / "out")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_run_writes_for_wandb_without_a_network(tmp_path: Path) -> None:
    done = train(tmp_path, *with_trackers("wandb"), WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert wandb_losses(tmp_path / "out") == pytest.approx(written_losses(tmp_path / "out"))
    assert "everything in" in done.stdout
    assert "wandb" not in done.stdout.replace(str(tmp_path), "")


@pytest.mark.slow
def test_a_tracker_whose_folder_is_blocked_stops_no_run(tmp_path: Path) -> None:
    assert train(tmp_path, "--stop-after", "3").returncode == 0
    (tmp_path / "out" / "tensorboard").write_text("a file where the folder should be")
    done = train(tmp_path, *with_trackers("tensorboard"), "--resume", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("tensorboard is switched off") == 1
    assert len(written_losses(tmp_path / "out")) == 6


@pytest.mark.slow
def test_wandb_without_a_key_stops_no_run(tmp_path: Path) -> None:
    done = train(tmp_path, *with_trackers("wandb"), WANDB_MODE="online")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("wandb is switched off") == 1
    assert len(written_losses(tmp_path / "out")) == 6


FULL_DISK = """\
import resource, sys
from pathlib import Path
from tests.sample_runs import sample_steps
from xtrain.records.trackers import open_trackers

said = []
trackers = open_trackers(["tensorboard"], Path(sys.argv[1]), {}, said.append)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for record in sample_steps(2000):
    trackers.log(record)
trackers.close()
print(*said, sep="\\n")
"""


@pytest.mark.slow
def test_a_full_disk_switches_tensorboard_off_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout == "tensorboard is switched off: OSError: [Errno 27] File too large; training goes on\n"
    )
