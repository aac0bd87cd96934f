"""Control groups: trees of files as Linux has them, and where one may be made, a real group."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clean_process import start
from xtrain.measure import cgroup
from xtrain.measure.cgroup import Kills
from xtrain.measure.machine import host_room_bytes

MIB = 1 << 20


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders proc and cgroup that stand for the system's."""
    monkeypatch.setattr(cgroup, "PROC", tmp_path / "proc")
    monkeypatch.setattr(cgroup, "MOUNTS", tmp_path / "cgroup")
    return tmp_path


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")


def test_the_tightest_of_nested_groups_counts(tree: Path) -> None:
    put(tree / "proc", {"self/cgroup": "0::/job/step"})
    put(tree / "cgroup/job/step", {"memory.max": "max", "memory.current": str(100 * MIB)})
    put(tree / "cgroup/job", {"memory.max": str(500 * MIB), "memory.current": str(300 * MIB)})
    assert cgroup.room_bytes() == 200 * MIB


def test_what_others_of_the_group_hold_is_gone_and_cached_files_are_not(tree: Path) -> None:
    put(tree / "proc", {"self/cgroup": "0::/job"})
    put(tree / "cgroup/job", {"memory.max": str(500 * MIB), "memory.current": str(450 * MIB)})
    put(tree / "cgroup/job", {"memory.stat": f"anon 5\ninactive_file {40 * MIB}\nactive_file 7"})
    assert cgroup.room_bytes() == 90 * MIB


OF_THE_FIRST_VERSION = "5:cpu,cpuacct:/job\n4:memory:/job:1\n1:name=systemd:/\n0::/"


def test_groups_of_the_first_version_count_beside_an_empty_second(tree: Path) -> None:
    put(tree / "proc", {"self/cgroup": OF_THE_FIRST_VERSION})
    memory = tree / "cgroup/memory"
    put(memory, {"memory.limit_in_bytes": "9223372036854771712", "memory.usage_in_bytes": "5"})
    put(memory / "job:1", {"memory.limit_in_bytes": str(64 * MIB), "memory.usage_in_bytes": str(16 * MIB)})
    put(memory / "job:1", {"memory.stat": f"inactive_file 1\ntotal_inactive_file {MIB}"})
    assert cgroup.room_bytes() == 49 * MIB


def test_in_a_container_that_sees_only_its_own_part_the_limit_is_found(tree: Path) -> None:
    put(tree / "proc", {"self/cgroup": "4:memory:/docker/0123abcd"})
    put(tree / "cgroup/memory", {"memory.limit_in_bytes": str(64 * MIB), "memory.usage_in_bytes": "0"})
    assert cgroup.room_bytes() == 64 * MIB


@pytest.mark.parametrize("groups", ["", "0::/", "0::/job", "no such form"])
def test_without_a_limit_there_is_no_figure(tree: Path, groups: str) -> None:
    put(tree / "proc", {"self/cgroup": groups})
    put(tree / "cgroup/job", {"memory.max": "max", "memory.current": "17"})
    assert cgroup.room_bytes() is None


def test_the_limit_of_a_group_is_room_of_the_host(tree: Path) -> None:
    put(tree / "proc", {"self/cgroup": "0::/job"})
    put(tree / "cgroup/job", {"memory.max": str(9 * MIB), "memory.current": str(2 * MIB)})
    assert host_room_bytes() == 7 * MIB
    put(tree / "cgroup/job", {"memory.current": str(10 * MIB)})
    assert host_room_bytes() == 0


def test_a_kill_that_the_group_counts_was_for_memory(tree: Path) -> None:
    put(tree / "proc", {"self/cgroup": "0::/job", "vmstat": "pgfault 5\noom_kill 7"})
    put(tree / "cgroup/job", {"memory.current": "1", "memory.events": "low 0\noom 4\noom_kill 2"})
    before = Kills.now()
    assert before == Kills(of_group=2, anywhere=7)
    assert before.explain(Kills.now()) == "no"
    put(tree / "cgroup/job", {"memory.events": "low 0\noom 5\noom_kill 3"})
    assert before.explain(Kills.now()) == "yes"


def test_the_first_version_counts_kills_too(tree: Path) -> None:
    put(tree / "proc", {"self/cgroup": OF_THE_FIRST_VERSION})
    control = "oom_kill_disable 0\nunder_oom 0\noom_kill 4"
    put(tree / "cgroup/memory/job:1", {"memory.usage_in_bytes": "1", "memory.oom_control": control})
    assert Kills.now() == Kills(of_group=4, anywhere=None)


def test_a_kill_counted_elsewhere_on_the_machine_is_likely_this_one(tree: Path) -> None:
    put(tree / "proc", {"vmstat": "oom_kill 7"})
    before = Kills.now()
    put(tree / "proc", {"vmstat": "oom_kill 8"})
    assert before.explain(Kills.now()) == "likely"


def test_a_system_that_does_not_tell_leaves_a_guess(tree: Path) -> None:
    assert Kills.now().explain(Kills.now()) == "unknown"


LIMIT_BYTES = 64 * MIB


@pytest.fixture
def real_group() -> Iterator[Path]:
    """A group of the system, beside all others, with a limit."""
    found = list(cgroup._groups())
    if not found:
        pytest.skip("needs Linux with control groups that count memory")
    files = found[0][1]
    root = cgroup.MOUNTS / "memory" if files == cgroup.V1 else cgroup.MOUNTS
    group = root / f"xtrain-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"needs the right to make a control group: {error.strerror}")
    try:
        if not (group / files.limit).exists():
            pytest.skip(f"needs control groups that count memory below {root}")
        (group / files.limit).write_text(str(LIMIT_BYTES))
        yield group
    finally:
        group.rmdir()


def take_too_much(group: str, found: str) -> None:
    """In a process of its own: join the group, leave word of its room, then take twice as much."""
    (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
    Path(found).write_text(json.dumps([host_room_bytes(), Kills.now().of_group]))
    ballast = b"x" * (2 * LIMIT_BYTES)
    os._exit(len(ballast) % 2)


def test_a_real_limit_is_seen_and_what_dies_of_it_is_counted(real_group: Path, tmp_path: Path) -> None:
    before = Kills.now()
    process = start(take_too_much, str(real_group), str(tmp_path / "found"))
    process.join(60)
    exitcode = process.exitcode
    process.kill()  # while it lives, the group cannot be removed
    process.join()
    room_bytes, kills = json.loads((tmp_path / "found").read_text())
    assert LIMIT_BYTES // 2 < room_bytes <= LIMIT_BYTES
    assert kills == 0
    assert exitcode == -signal.SIGKILL
    assert before.explain(Kills.now()) in ("yes", "likely")
