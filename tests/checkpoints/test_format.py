from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from xtrain.checkpoints import format
from xtrain.checkpoints.format import (
    MOMENTS,
    STATE,
    WEIGHTS,
    Checkpoint,
    CheckpointError,
    State,
    Tensors,
    complete_checkpoints,
    write,
)

TENSORS: Tensors = {
    ("a.weight", "weight"): torch.arange(6.0).reshape(2, 3),
    ("a.weight", "exp_avg"): torch.ones(2, 3),
    ("a.counts", "buffer"): torch.tensor([1, 2]),
}


def state(step: int, **changes: Any) -> State:
    values = {
        "backend": "cpu",
        "world": 1,
        "guards": None,
        "extras": [{"optimizer_steps": step}],
        "data_hash": "abc",
        "spec": {"train": {"steps": 10}},
        "versions": {},
    }
    return State(step=step, **{**values, **changes})


def folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def test_what_was_written_is_read_back_by_name_and_kind(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, state(7), TENSORS)
    assert checkpoint.path == tmp_path / "step-00000007"
    assert checkpoint.state() == state(7)
    reader = checkpoint.reader()
    for (name, kind), tensor in TENSORS.items():
        found = reader.read(name, kind)
        assert found is not None
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)
    assert reader.read("a.weight", "exp_avg_sq") is None
    assert reader.read("b.weight", "weight") is None


def test_a_checkpoint_is_two_tensor_files_and_one_json_without_pickles(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = write(tmp_path, state(7), TENSORS).path
    assert folders(path) == [MOMENTS, STATE, WEIGHTS]
    with safe_open(path / WEIGHTS, framework="pt") as weights, safe_open(path / MOMENTS, "pt") as moments:
        assert sorted(weights.keys()) == ["a.counts", "a.weight"]
        assert list(moments.keys()) == ["exp_avg/a.weight"]
    assert json.loads((path / STATE).read_text())["format_version"] == 1


def test_strided_tensors_and_views_of_one_storage_are_stored(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    tensors: Tensors = {
        ("turned", "weight"): whole.reshape(2, 3).t(),
        ("same", "weight"): whole,
        ("spread", "buffer"): torch.ones(1).expand(4),
    }
    reader = write(tmp_path, state(1), tensors).reader()
    for (name, kind), tensor in tensors.items():
        found = reader.read(name, kind)
        assert found is not None
        assert torch.equal(found, tensor)


def test_checkpoints_are_listed_by_step_number_and_nothing_else_is(tmp_path: Path) -> None:
    for step in (100_000_000, 9, 20):
        write(tmp_path, state(step), {})
    (tmp_path / ".step-00000030.77").mkdir()
    (tmp_path / "step-30").mkdir()
    (tmp_path / "step-00000040.bak").mkdir()
    (tmp_path / "step-00000050").touch()
    assert [found.step for found in complete_checkpoints(tmp_path)] == [9, 20, 100_000_000]
    assert complete_checkpoints(tmp_path / "missing") == []


def test_leftovers_of_a_writer_that_died_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".step-00000003.77").mkdir()
    (tmp_path / ".step-00000003.77" / WEIGHTS).write_bytes(b"half")
    write(tmp_path, state(4), TENSORS)
    assert folders(tmp_path) == ["step-00000004"]


def test_the_same_step_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path, state(4), TENSORS)
    written = write(tmp_path, state(4, backend="deepspeed"), {})
    assert folders(tmp_path) == ["step-00000004"]
    assert written.state().backend == "deepspeed"
    assert written.reader().read("a.weight", "weight") is None


@pytest.mark.parametrize("fails", ["_save", "write_json", "_sync"])
def test_a_failed_write_leaves_the_earlier_ones_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = write(tmp_path, state(4), TENSORS)
    monkeypatch.setattr(format, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, state(5), TENSORS)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, state(4), {})
    assert folders(tmp_path) == ["step-00000004"]
    assert before.reader().read("a.weight", "weight") is not None


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def foreign(file: Path) -> None:
    file.write_bytes(b"\x93NUMPY\x01\x00 and so on, whatever it may be" * 10)


def endless_header(file: Path) -> None:
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


DAMAGES: list[Callable[[Path], None]] = [truncate, foreign, endless_header, Path.unlink]


@pytest.mark.parametrize("damage", [*DAMAGES, Path.touch], ids=lambda d: d.__name__)
@pytest.mark.parametrize("file", [WEIGHTS, MOMENTS])
def test_a_damaged_tensor_file_is_named(tmp_path: Path, file: str, damage: Callable[[Path], None]) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    checkpoint.check_files()
    if damage is Path.touch:
        (checkpoint.path / file).write_bytes(b"")
    else:
        damage(checkpoint.path / file)
    with pytest.raises(CheckpointError, match=f"{file} is damaged or missing: "):
        checkpoint.check_files()
    with pytest.raises(CheckpointError, match=f"{file} is damaged or missing: "):
        checkpoint.reader().read("a.weight", "weight" if file == WEIGHTS else "exp_avg")


def changed(**changes: Any) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "state.json is damaged: Invalid JSON"),
        (foreign, "state.json is damaged: Invalid JSON"),
        (Path.unlink, "cannot read .*state.json: No such file or directory"),
        (changed(step="4"), "state.json is damaged: step: Input should be a valid integer"),
        (changed(step=5), "state.json says step 5, its folder step 4"),
        (changed(format_version=2), "state.json has format version 2; this xtrain reads 1"),
        (lambda file: file.write_text('{"format_version": 2}'), "has format version 2; this xtrain reads 1"),
        (changed(extras=[]), "state.json is damaged: extras: List should have at least 1 item"),
        (changed(extras=None), "state.json is damaged: extras: Input should be a valid"),
        (lambda file: os.truncate(file, 1 << 30), "state.json is too large: more than 67108864 bytes"),
        (lambda file: file.write_text("[" * 100_000), "state.json is damaged: Invalid JSON"),
    ],
)
def test_a_damaged_state_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    damage(checkpoint.path / STATE)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.state()


def test_keys_of_a_later_xtrain_are_ignored(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    changed(mood="good")(checkpoint.path / STATE)
    assert checkpoint.state() == state(4)


def test_a_state_without_tensors_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from xtrain.checkpoints.format import State, write\n"
        "state = State(step=1, backend='null', world=1, guards=None, extras=[{}], data_hash='', spec={},"
        " versions={})\n"
        f"one = write(Path({str(tmp_path)!r}), state, {{}}); one.check_files(); one.state()\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_a_full_disk_is_an_oserror_that_costs_nothing_already_there(small_disk: Path) -> None:
    write(small_disk, state(1), TENSORS)
    with pytest.raises(OSError, match="No space left on device"):
        write(small_disk, state(2), {("big", "weight"): torch.zeros(1 << 20)})
    assert folders(small_disk) == ["step-00000001"]
    assert Checkpoint(small_disk / "step-00000001", 1).reader().read("a.weight", "weight") is not None
