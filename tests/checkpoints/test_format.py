from __future__ import annotations

import errno
import hashlib
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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests import mounts
from xtrain.checkpoints import writer
from xtrain.checkpoints.format import (
    MANIFEST,
    MODEL_INDEX,
    OPTIMIZER_INDEX,
    STATE,
    Checkpoint,
    CheckpointError,
    Damaged,
    State,
    complete_checkpoints,
    manifest_bytes,
)
from xtrain.checkpoints.tensorfile import DTYPES
from xtrain.checkpoints.writer import Tensors, form_of, write, write_streamed
from xtrain.contract import StatePiece
from xtrain.models.hf_folder import CONFIG

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


@pytest.mark.parametrize("others", [{}, {CONFIG: b"{}"}], ids=["ours", "of a library"])
def test_names_are_ours_whatever_a_librarys_are_in_the_files(
    tmp_path: Path, others: dict[str, bytes]
) -> None:
    """A library may have names that begin as our wrapper does."""
    tensors: Tensors = {
        ("model.model.a", "weight"): torch.ones(2),
        ("model.model.a", "exp_avg"): torch.ones(3),
        ("model.a", "weight"): torch.ones(4),
    }
    layout = {key: form_of(tensor) for key, tensor in tensors.items()}
    pieces = (StatePiece(*key, tensor) for key, tensor in tensors.items())
    checkpoint = write_streamed(tmp_path, state(7), layout, pieces, others)
    checkpoint.check(hashes=True)
    reader = checkpoint.reader()
    for (name, kind), tensor in tensors.items():
        found = reader.read(name, kind)
        assert found is not None
        assert found.shape == reader.shape(name, kind) == tensor.shape
    assert sorted(reader.keys("weight")) == ["model.a", "model.model.a"]
    assert reader.keys("exp_avg") == ["exp_avg/model.model.a"]
    expected = ["a", "model.a"] if others else ["model.a", "model.model.a"]
    assert sorted(load_file(checkpoint.path / WEIGHTS)) == expected


WEIGHTS = "model-00001-of-00001.safetensors"
MOMENTS = "optimizer-00001-of-00001.safetensors"


def test_a_checkpoint_is_safetensors_and_json_without_pickles(tmp_path: Path) -> None:
    path = write(tmp_path, state(7), TENSORS).path
    assert folders(path) == sorted([WEIGHTS, MOMENTS, MODEL_INDEX, OPTIMIZER_INDEX, STATE, MANIFEST])
    assert sorted(load_file(path / WEIGHTS)) == ["a.counts", "a.weight"]
    assert sorted(load_file(path / MOMENTS)) == ["exp_avg/a.weight"]
    assert json.loads((path / STATE).read_text())["format_version"] == 2


def test_the_index_is_as_hugging_face_has_it(tmp_path: Path) -> None:
    path = write(tmp_path, state(7), TENSORS).path
    assert json.loads((path / MODEL_INDEX).read_text()) == {
        "metadata": {"total_size": 24 + 16},
        "weight_map": {"a.counts": WEIGHTS, "a.weight": WEIGHTS},
    }
    with safe_open(path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_manifest_has_size_and_hash_of_every_other_file(tmp_path: Path) -> None:
    path = write(tmp_path, state(7), TENSORS).path
    listed = json.loads((path / MANIFEST).read_text())["files"]
    assert sorted(listed) == [name for name in folders(path) if name != MANIFEST]
    for name, facts in listed.items():
        content = (path / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_buffers_keep_their_dtype(tmp_path: Path, dtype: str) -> None:
    tensors: Tensors = {
        ("odd", "weight"): torch.ones(3),
        ("odd.flag", "buffer"): torch.tensor([True]),
        ("buffer", "buffer"): torch.ones(2, 5).to(getattr(torch, dtype)),
        ("number", "buffer"): torch.tensor(5),
    }
    reader = write(tmp_path, state(7), tensors).reader()
    for (name, kind), tensor in tensors.items():
        found = reader.read(name, kind)
        assert found is not None
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor)


def test_a_dtype_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"turns has dtype torch\.complex64, which a checkpoint cannot hold"):
        write(tmp_path, state(7), {("turns", "buffer"): torch.ones(1, dtype=torch.complex64)})
    assert folders(tmp_path) == []


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


@pytest.mark.parametrize("fails", ["write_pieces", "finish_files", "_write", "sync"])
def test_a_failed_write_leaves_the_earlier_ones_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = write(tmp_path, state(4), TENSORS)
    monkeypatch.setattr(writer, fails, full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, state(5), TENSORS)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, state(4), {})
    assert folders(tmp_path) == ["step-00000004"]
    assert before.reader().read("a.weight", "weight") is not None


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def lengthen(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b" ")


def foreign(file: Path) -> None:
    file.write_bytes(b"\x93NUMPY\x01\x00 and so on, whatever it may be" * 10)


def linked(file: Path) -> None:
    elsewhere = file.parent.parent / file.name
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


ALL_FILES = [WEIGHTS, MOMENTS, MODEL_INDEX, OPTIMIZER_INDEX, STATE, MANIFEST]
DAMAGES: list[Callable[[Path], None]] = [truncate, lengthen, foreign, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("file", ALL_FILES)
def test_a_damaged_file_is_named_without_reading_it_all(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    damage(checkpoint.path / file)
    with pytest.raises(Damaged, match=file):
        Checkpoint(checkpoint.path, 4).check(hashes=False)


@pytest.mark.parametrize("file", ALL_FILES)
def test_any_byte_that_flipped_is_found(
    tmp_path: Path, file: str, record_property: Callable[[str, object], None]
) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    path = checkpoint.path / file
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(Damaged, match=file):
            Checkpoint(checkpoint.path, 4).check(hashes=True)
    path.write_bytes(whole)
    Checkpoint(checkpoint.path, 4).check(hashes=True)
    record_property("bytes flipped one at a time", len(whole))


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    linked(checkpoint.path / WEIGHTS)
    with pytest.raises(Damaged, match=f"{WEIGHTS} is damaged: expected a file"):
        Checkpoint(checkpoint.path, 4).check(hashes=False)


def forged(checkpoint: Checkpoint, file: str, content: dict[str, Any]) -> Checkpoint:
    """With a file that someone made, and a manifest that fits it."""
    data = json.dumps(content).encode()
    manifest = json.loads((checkpoint.path / MANIFEST).read_text())
    if file == MANIFEST:
        data = manifest_bytes({**manifest, **content})
    else:
        manifest["files"][file] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (checkpoint.path / MANIFEST).write_bytes(manifest_bytes(manifest))
    (checkpoint.path / file).write_bytes(data)
    return Checkpoint(checkpoint.path, checkpoint.step)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "a\\b", "a\n"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    with pytest.raises(Damaged, match="String should match pattern"):
        forged(checkpoint, MODEL_INDEX, {"weight_map": {"a.weight": name}}).check(hashes=True)
    facts = {"bytes": 1, "sha256": "0" * 64}
    with pytest.raises(Damaged, match="String should match pattern"):
        forged(checkpoint, MANIFEST, {"files": {name: facts}}).check(hashes=True)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a.weight": "other.safetensors"}, "index.json is damaged: manifest.json has no other.safetensors"),
        ({"b.weight": WEIGHTS}, "00001.safetensors is damaged: .*b.weight"),
        ({"a.weight": STATE}, "state.json is damaged: "),
    ],
)
def test_an_index_that_promises_what_is_not_there_is_named(
    tmp_path: Path, weight_map: dict[str, str], message: str
) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    with pytest.raises(Damaged, match=message):
        forged(checkpoint, MODEL_INDEX, {"weight_map": weight_map}).check(hashes=True)


@pytest.mark.parametrize("file", [STATE, MODEL_INDEX, OPTIMIZER_INDEX])
def test_a_manifest_that_lists_less_than_a_checkpoint_has_is_damaged(tmp_path: Path, file: str) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    listed = json.loads((checkpoint.path / MANIFEST).read_text())["files"]
    del listed[file]
    shorter = forged(checkpoint, MANIFEST, {"files": listed})
    with pytest.raises(Damaged, match=rf"manifest.json is damaged: it does not list {file}"):
        shorter.check(hashes=False)


def test_one_that_made_room_for_a_new_one_that_never_came_is_found_and_put_back(tmp_path: Path) -> None:
    write(tmp_path, state(4), TENSORS)
    write(tmp_path, state(8), TENSORS)
    (tmp_path / "step-00000008").rename(tmp_path / ".step-00000008.replaced")
    (tmp_path / ".step-00000008.77").mkdir()  # the new one
    assert [one.step for one in complete_checkpoints(tmp_path)] == [4, 8]
    complete_checkpoints(tmp_path)[1].check(hashes=True)
    write(tmp_path, state(9), TENSORS)
    assert folders(tmp_path) == ["step-00000004", "step-00000008", "step-00000009"]


def test_one_that_made_room_goes_where_the_new_one_came(tmp_path: Path) -> None:
    shutil.copytree(write(tmp_path, state(8), {}).path, tmp_path / ".step-00000008.replaced")
    write(tmp_path, state(8), TENSORS)
    assert folders(tmp_path) == ["step-00000008"]
    assert complete_checkpoints(tmp_path)[0].reader().read("a.weight", "weight") is not None


def test_a_weight_that_is_not_fp32_is_refused_unread(tmp_path: Path) -> None:
    tensors: Tensors = {("a.weight", "buffer"): torch.ones(2, dtype=torch.float64)}
    with pytest.raises(Damaged, match=r"a.weight has dtype F64, expected F32"):
        write(tmp_path, state(4), tensors).reader().read("a.weight", "weight")


def header(text: str, length: int | None = None) -> bytes:
    data = text.encode()
    return (len(data) if length is None else length).to_bytes(8, "little") + data


@pytest.mark.parametrize(
    "content",
    [
        header("{}", length=1 << 62),
        header('{"a.weight": {"dtype": "F32", "shape": [1152921504606846976], "data_offsets": [0, 4]}}')
        + b"abcd",
        header('{"a.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4611686018427387904]}}')
        + b"abcd",
        header('{"a.weight": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}') + b"abcd",
        header('{"a.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}') + b"abcd",
        header("[" * 50_000),
    ],
    ids=["endless header", "huge shape", "huge offsets", "unknown dtype", "negative shape", "deep"],
)
def test_a_tensor_file_that_lies_is_refused_before_memory_is_taken(tmp_path: Path, content: bytes) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    manifest = json.loads((checkpoint.path / MANIFEST).read_text())
    manifest["files"][WEIGHTS] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint.path / WEIGHTS).write_bytes(content)
    (checkpoint.path / MANIFEST).write_bytes(manifest_bytes(manifest))
    with pytest.raises(Damaged, match=f"{WEIGHTS} is damaged: "):
        Checkpoint(checkpoint.path, 4).check(hashes=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": "4"}, "state.json is damaged: step: Input should be a valid integer"),
        ({"step": 5}, "state.json says step 5, its folder step 4"),
        ({"extras": []}, "state.json is damaged: extras: List should have at least 1 item"),
        ({"extras": None}, "state.json is damaged: extras: Input should be a valid"),
    ],
)
def test_a_state_that_someone_made_is_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    content = json.loads((checkpoint.path / STATE).read_text())
    with pytest.raises(Damaged, match=message):
        forged(checkpoint, STATE, {**content, **changes}).check(hashes=True)


def test_a_state_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    os.truncate(checkpoint.path / STATE, 1 << 40)
    with pytest.raises(
        Damaged, match=r"state.json is too large: 1099511627776 bytes, at most 67108864 are read"
    ):
        checkpoint.state()


def test_a_later_format_is_not_damage_but_a_wrong_request(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    with pytest.raises(
        CheckpointError, match="has format version 3; this xtrain reads 1 and 2: use"
    ) as caught:
        forged(checkpoint, MANIFEST, {"format_version": 3}).check(hashes=True)
    assert not isinstance(caught.value, Damaged)


def test_the_first_format_is_still_read(tmp_path: Path) -> None:
    folder = tmp_path / "step-00000004"
    folder.mkdir()
    save_file({"a.weight": torch.ones(2), "a.counts": torch.tensor([1])}, folder / "weights.safetensors")
    save_file({"exp_avg/a.weight": torch.zeros(2)}, folder / "moments.safetensors")
    content = {**state(4).model_dump(mode="json"), "format_version": 1}
    (folder / STATE).write_text(json.dumps(content))
    checkpoint = Checkpoint(folder, 4)
    checkpoint.check(hashes=True)
    for name, kind in (("a.weight", "weight"), ("a.counts", "buffer"), ("a.weight", "exp_avg")):
        assert checkpoint.reader().read(name, kind) is not None  # type: ignore[arg-type]
    assert checkpoint.reader().read("b.weight", "weight") is None
    truncate(folder / "moments.safetensors")
    with pytest.raises(Damaged, match=r"moments.safetensors is damaged: "):
        Checkpoint(folder, 4).check(hashes=True)


def test_keys_of_a_later_xtrain_are_ignored(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, state(4), TENSORS)
    content = json.loads((checkpoint.path / STATE).read_text())
    later = forged(forged(checkpoint, STATE, {**content, "mood": "good"}), MANIFEST, {"mood": "good"})
    later.check(hashes=True)
    assert later.state() == state(4)


def test_a_state_without_tensors_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from xtrain.checkpoints.format import State\n"
        "from xtrain.checkpoints.writer import write\n"
        "state = State(step=1, backend='null', world=1, guards=None, extras=[{}], data_hash='', spec={},"
        " versions={})\n"
        f"one = write(Path({str(tmp_path)!r}), state, {{}}); one.check(hashes=True); one.state()\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounts.small_disk(tmp_path / "disk", "1m") as disk:
        yield disk


def test_a_full_disk_is_an_oserror_that_costs_nothing_already_there(small_disk: Path) -> None:
    write(small_disk, state(1), TENSORS)
    with pytest.raises(OSError, match="No space left on device"):
        write(small_disk, state(2), {("big", "weight"): torch.zeros(1 << 20)})
    assert folders(small_disk) == ["step-00000001"]
    assert Checkpoint(small_disk / "step-00000001", 1).reader().read("a.weight", "weight") is not None
