"""`xtrain run` refused: for as many processes as the run would have, with every place in the file."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from xtrain import registry
from xtrain.cli import main

SPEC = """\
model: {preset: gpt2-nano}
data: {source: synthetic}
batch: {global: 12, micro: 4}
train: {steps: 2}
optimizer: {lr: 1e-3}
"""


@pytest.fixture(autouse=True)
def inside_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(text: str, *words: str) -> list[str]:
    """The lines on standard error of a run that must not start."""
    Path("spec.yaml").write_text(text)
    result = CliRunner().invoke(main, ["run", "spec.yaml", *words])
    assert (result.exit_code, result.stdout) == (2, "")
    assert [path.name for path in Path().iterdir()] == ["spec.yaml"]
    return result.stderr.splitlines()


SHARED = "expected a multiple of micro (4) x processes (2) = 8; nearest: global 8 or 16, or micro 3 or 6"


def test_batch_is_checked_for_the_processes_that_were_asked_for() -> None:
    assert refused(SPEC, "--nproc", "2") == [
        "error: spec.yaml has 1 problem",
        f"  3:17: batch.global: found 12, {SHARED}",
    ]


def test_batch_is_checked_for_the_processes_of_the_job_that_was_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("xtrain.run.register", lambda rank: None)  # it would end this process with its parent
    assert refused(SPEC) == ["error: spec.yaml has 1 problem", f"  3:17: batch.global: found 12, {SHARED}"]


def test_a_job_of_another_size_than_the_spec_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("xtrain.run.register", lambda rank: None)
    assert refused(f"{SPEC}launch: {{processes: 1}}\n") == [
        "error: launch.processes is 1, but the job that this process joined has 3; start 1, or say --nproc 3"
    ]


ON_A_DRIVE = "memory: {offload: {optimizer: {device: nvme, path: drive}}}\n"


def test_named_backend_refuses_together_with_the_checks_of_the_spec() -> None:
    assert refused(f"{SPEC}{ON_A_DRIVE}", "--backend", "cpu", "--nproc", "2") == [
        "error: spec.yaml, on backend cpu, has 3 problems",
        f"  3:17: batch.global: found 12, {SHARED}",
        "  6:31: memory.offload.optimizer: found nvme, this backend offloads to the CPU only; use cpu, or "
        "--backend deepspeed",
        "  launch.processes: found 2, backend cpu is always one process; use --nproc 1, or --backend "
        "deepspeed for 2 processes",
    ]


def test_a_launch_that_cannot_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(registry.load("null")), "problems", lambda *_: [])
    many = SPEC.replace("global: 12, micro: 4", "global: 100_000, micro: 1")
    (message,) = refused(many, "--backend", "null", "--nproc", "100000", "--out", "out")
    assert message.startswith("error: 100000 processes were asked for, and this machine has ")


@pytest.mark.slow  # asks every backend whether it is usable, which imports its library
def test_backend_that_was_chosen_refuses_with_the_place_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    head, *lines = refused(f"{SPEC}{ON_A_DRIVE}", "--set", "train.compile=true")
    assert head.startswith("error: spec.yaml, on backend ")
    assert [line.split(" found")[0] for line in lines] == [
        "  6:31: memory.offload.optimizer:",
        "  --set train.compile=true: train.compile:",
    ]


@pytest.mark.parametrize("moment", ["xtrain.spec.load.check_spec", "xtrain.work.open_data"])
def test_the_spec_that_is_kept_is_the_one_that_was_read(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever edits the file meanwhile, for the next run, does not change this one's."""
    Path("spec.yaml").write_text(SPEC)
    as_it_was = pkgutil.resolve_name(moment)

    def edited_meanwhile(*given: Any, **named: Any) -> Any:
        Path("spec.yaml").write_text("another")
        return as_it_was(*given, **named)

    monkeypatch.setattr(moment, edited_meanwhile)
    done = CliRunner().invoke(main, ["run", "spec.yaml", "--backend", "null", "--out", "out"])
    assert done.exit_code == 0, done.output
    assert Path("out/spec.yaml").read_text() == SPEC
