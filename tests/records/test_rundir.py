from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.started import running
from xtrain.errors import RequestError
from xtrain.records.rundir import RunDirectory, write_json, write_text


def test_default_directories_are_numbered_and_never_reused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-2").mkdir(parents=True)

    made = [RunDirectory.create(None, "tiny").path for _ in range(2)]

    assert made == [Path("runs/tiny-1"), Path("runs/tiny-3")]


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    assert RunDirectory.create(tmp_path, "tiny").path == tmp_path


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "run"
    RunDirectory.create(out, "tiny")
    with pytest.raises(RequestError) as caught:
        RunDirectory.create(out, "tiny")
    expected = f"{out} already holds a run; choose another --out, or continue it with --resume {out}"
    assert str(caught.value) == expected


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(RequestError, match="is not empty; choose another --out"):
        RunDirectory.create(tmp_path, "tiny")


def test_a_file_is_no_place_for_a_run(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(RequestError, match="is a file; choose another --out"):
        RunDirectory.create(file, "tiny")
    with pytest.raises(RequestError, match="cannot create the run directory"):
        RunDirectory.create(file / "below", "tiny")


def test_open_finds_a_run_and_refuses_anything_else(tmp_path: Path) -> None:
    created = RunDirectory.create(tmp_path / "run", "tiny")
    assert RunDirectory.open(created.path) == created
    with pytest.raises(RequestError, match="is not a run directory: not there"):
        RunDirectory.open(tmp_path / "missing")
    with pytest.raises(RequestError, match=r"found none of resolved\.json, metrics\.jsonl, record\.json"):
        RunDirectory.open(tmp_path)


def test_a_second_writer_is_refused_by_name_and_may_follow_the_first(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "tiny")
    with run.lock():
        with pytest.raises(RequestError) as caught, run.lock():
            pass
        assert f"is being written by process {os.getpid()} on " in str(caught.value)
    with run.lock():
        pass
    assert (run.path / "lock").read_text() == ""  # host names do not travel with a run


@pytest.mark.slow
def test_a_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "tiny")
    program = (
        "import sys; from pathlib import Path; from xtrain.records.rundir import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).lock(): print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(run.path)]
    with running(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "locked\n"
        with pytest.raises(RequestError, match=f"process {writer.pid} on"), run.lock():
            pass
        writer.kill()
    with run.lock():
        pass


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write_json(file, {"loss": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"loss": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    assert file.read_text() == '{\n  "loss": 1.5\n}\n'
    assert list(tmp_path.iterdir()) == [file]
