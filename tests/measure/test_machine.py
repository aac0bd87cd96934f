from __future__ import annotations

import json
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from xtrain import __version__
from xtrain.measure import machine

MIB = 1 << 20


def test_the_environment_is_json_and_names_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    found = json.loads(json.dumps(machine.environment(), allow_nan=False))
    assert found["packages"]["xtrain"] == __version__
    assert found["packages"]["torch"]
    assert found["python"] == platform.python_version()
    assert found["omp_num_threads"] == "3"
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert found["logical_cores"] == os.cpu_count()


def test_host_and_user_stay_out_of_the_environment() -> None:
    text = json.dumps({k: v for k, v in machine.environment().items() if k != "platform"})
    assert str(Path.home()) not in text
    assert "host" not in text


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert machine.package_version("no-such-package-anywhere") is None


@pytest.mark.slow
def test_the_environment_imports_nothing_that_it_describes() -> None:
    program = (
        "import sys; from xtrain.measure.machine import environment; environment()\n"
        "print(sorted({'torch', 'numpy', 'deepspeed', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_resident_set_agrees_with_the_system_and_the_peak_is_not_below_it() -> None:
    counter = machine.resident_bytes()
    assert counter.bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert counter.peak_bytes is not None
    assert counter.peak_bytes >= 0.9 * counter.bytes
    assert counter.method == "counter"


def test_the_peak_sees_memory_that_came_and_went_until_it_is_reset() -> None:
    if not machine.reset_peak_resident():
        pytest.skip("needs a writable /proc/self/clear_refs")
    before = machine.resident_bytes().bytes
    with mmap.mmap(-1, 64 * MIB) as ballast:  # not from malloc, which may have the memory already
        for _ in range(64):
            ballast.write(b"x" * MIB)
    raised = machine.resident_bytes().peak_bytes
    assert raised is not None
    assert raised > before + 48 * MIB
    assert machine.reset_peak_resident()
    reset = machine.resident_bytes().peak_bytes
    assert reset is not None
    assert reset < raised - 32 * MIB


def test_without_proc_the_portable_counters_serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "_STATUS", tmp_path / "missing")
    monkeypatch.setattr(machine, "_CLEAR_REFS", tmp_path / "missing" / "too")
    counter = machine.resident_bytes()
    assert counter.bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    assert counter.peak_bytes is not None
    assert counter.peak_bytes >= 0.9 * counter.bytes
    assert not machine.reset_peak_resident()


def test_the_git_commit_says_when_files_changed(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(tmp_path), *identity, *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    assert machine.git_commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "model.py").write_text("a")
    git("add", "model.py")
    git("commit", "-q", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert machine.git_commit(tmp_path) == commit
    (tmp_path / "model.py").write_text("b")
    assert machine.git_commit(tmp_path) == f"{commit}-changed"
