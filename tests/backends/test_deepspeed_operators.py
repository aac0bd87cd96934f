"""DeepSpeed compiles in silence: it is said when it will, and only then."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from backends.deepspeed.operators import FILES, SHARED_MEMORY, announce, needed
from xtrain.spec.tree import Spec


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def compiled(folder: Path, name: str, sources: Path) -> None:
    (folder / name).mkdir()
    (folder / name / f"{name}.so").touch()
    (folder / name / "build.ninja").write_text(f"build shm.o: compile {sources}/ops/csrc/cpu/comm/shm.cpp\n")


def installed_deepspeed() -> Path:
    found = find_spec("deepspeed")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def said(names: list[str], installed: tuple[str, ...] = ()) -> list[str]:
    lines: list[str] = []
    announce(names, installed, lines.append)
    return lines


def test_what_is_not_compiled_yet_is_announced_in_one_line(folder: Path) -> None:
    assert said([SHARED_MEMORY, FILES]) == [
        f"DeepSpeed now compiles deepspeed_shm_comm and async_io into {folder}, once for this Python and "
        "torch; that usually takes half a minute each"
    ]


def test_a_folder_without_its_library_is_not_compiled(folder: Path) -> None:
    (folder / SHARED_MEMORY).mkdir()
    assert len(said([SHARED_MEMORY])) == 1


def test_what_another_environment_compiled_is_made_anew(folder: Path, tmp_path: Path) -> None:
    compiled(folder, SHARED_MEMORY, tmp_path / "other" / "deepspeed")
    assert len(said([SHARED_MEMORY])) == 1


def test_nothing_is_said_of_what_is_compiled_or_came_with_deepspeed(folder: Path) -> None:
    compiled(folder, SHARED_MEMORY, installed_deepspeed())
    assert said([SHARED_MEMORY]) == []
    assert said([FILES], installed=(FILES,)) == []
    assert said([]) == []


@pytest.mark.parametrize(
    ("offload", "on_cpu", "names"),
    [
        ({}, True, [SHARED_MEMORY]),
        ({}, False, []),
        ({"optimizer": "cpu"}, False, []),
        ({"optimizer": {"device": "nvme", "path": "/drive"}}, False, [FILES]),
        ({"parameters": {"device": "nvme", "path": "/drive"}}, True, [SHARED_MEMORY, FILES]),
    ],
    ids=str,
)
def test_operators_follow_from_device_and_drive(offload: Any, on_cpu: bool, names: list[str]) -> None:
    sections = {"batch": {"global": 1}, "train": {"steps": 1}, "optimizer": {"lr": 1.0}}
    memory = {"sharding": "parameters", "offload": offload}
    data = {"model": {"preset": "gpt2-nano"}, "data": {"source": "synthetic"}, **sections, "memory": memory}
    assert needed(Spec.model_validate(data), on_cpu) == names
