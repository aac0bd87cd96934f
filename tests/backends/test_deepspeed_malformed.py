"""Files that are not as DeepSpeed writes them: what is wrong is named with file and place, whatever it is."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from backends.deepspeed.stored import open_state
from backends.deepspeed.stored_whole import Stored
from tests.checkpoints.test_foreign import as_deepspeed_names_it
from xtrain.contract import StateKind
from xtrain.errors import RequestError

Files: TypeAlias = dict[str, Any]
"""Contents by file name."""
KINDS: tuple[StateKind, ...] = ("weight", "buffer", "exp_avg", "exp_avg_sq", "momentum")
WRONG: tuple[Any, ...] = (
    None,
    "text",
    -1,
    True,
    float("nan"),
    10**400,
    [],
    {},
    [[]],
    {1: 2},
    {"a": None},
    torch.ones(2, 2),
    torch.ones(1).expand(5),
    torch.ones(6, dtype=torch.complex64),
)


def moments(count: int, *shape: int) -> dict[str, Any]:
    return {"step": count, "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)}


def without_zero(fragment: Any) -> Files:
    optimizer = {"param_groups": [{"params": [0, 1]}], "state": {0: moments(4, 2, 3), 1: moments(4, 3)}}
    module = {"a": torch.ones(2, 3), "b": torch.ones(3), "c": torch.ones(1)}
    content = {"global_steps": 4, "module": module, "buffer_names": ["c"], "optimizer": optimizer}
    return {"mp_rank_00_model_states.pt": content}


def stage_1(fragment: Any) -> Files:
    """Six elements of `a` and three of `b` on two ranks."""
    files: Files = {"mp_rank_00_model_states.pt": {"global_steps": 4, "module": {"c": torch.ones(1)}}}
    for rank, places in enumerate(({"a": fragment(0, 5)}, {"a": fragment(0, 1), "b": fragment(1, 3)})):
        state = {
            "partition_count": [2],
            "param_slice_mappings": [places],
            "single_partition_of_fp32_groups": [torch.ones(5)],
            "base_optimizer_state": {"state": {0: moments(4, 5)}},
        }
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": state}
    return files


def stage_3(fragment: Any) -> Files:
    shapes = [{"a": torch.Size([2, 3]), "b": torch.Size([3])}]
    content = {"global_steps": 4, "param_shapes": shapes, "module": None}
    files: Files = {"zero_pp_rank_0_mp_rank_00_model_states.pt": content}
    for rank in range(2):
        state = {
            "partition_count": 2,
            "fp32_flat_groups": [torch.ones(5)],
            "optimizer_state_dict": {"state": {0: moments(4, 5)}},
        }
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": state}
    return files


def universal(fragment: Any) -> Files:
    files: Files = {
        "mp_rank_00_model_states.pt": {"global_steps": 4, "module": {"c": torch.ones(1)}},
        "zero/optimizer_state.pt": {"optimizer_state_dict": {"state": {0: {"step": torch.tensor(4.0)}}}},
    }
    for name, shape in {"a": (2, 3), "b": (3,)}.items():
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            files[f"zero/{name}/{kind}.pt"] = {"param": torch.ones(shape), "cat_dim": 0}
    return files


MADE = {"stage 0": without_zero, "stage 1": stage_1, "stage 3": stage_3, "universal": universal}


class Fake:
    """A checkpoint of DeepSpeed's in a folder, which can be changed one thing at a time."""

    def __init__(self, folder: Path, made: str, fragment: Any) -> None:
        self.folder = folder
        self.form = "ds-universal" if made == "universal" else "deepspeed"
        self.files = MADE[made](fragment)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            torch.save(content, folder / name)

    def refusal(self) -> str:
        """What is said of it; empty where it can be read."""
        try:
            self.read()
        except RequestError as error:
            return str(error)
        return ""

    def read(self) -> Stored:
        """All that an import asks for."""
        found = open_state(self.folder, self.form)
        assert found.step >= 0
        assert found.optimizer_steps >= 0
        assert found.loss_scaler is None
        for name, kind in itertools.product(found.names(), KINDS):
            tensor = found.read(name, kind)
            assert tensor is None or tensor.numel() < 100
        return found


@pytest.fixture(params=MADE)
def fake(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    kind = type(as_deepspeed_names_it(monkeypatch, "deepspeed.utils.tensor_fragment", "fragment_address"))

    def fragment(start: int, numel: int) -> Any:
        one = kind()
        vars(one).update(start=start, numel=numel)
        return one

    return Fake(tmp_path / "made", request.param, fragment)


def paths(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of everything below a content, and itself."""
    yield above
    keys: Any = (
        content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    )
    for key in keys:
        yield from paths(content[key], (*above, key))


def changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """With `value` at the path; without what is there where it is `...`."""
    if not path:
        return {} if value is ... else value
    whole = copy.deepcopy(content)
    place = whole
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return whole


@pytest.mark.parametrize("tag", ["..", ".", "../other", ""])
def test_a_latest_that_names_no_folder_beside_it_is_refused(tag: str, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(RequestError, match=rf"latest names '{re.escape(tag)}'; expected a folder beside it"):
        open_state(tmp_path, "deepspeed")


def test_a_pipe_under_the_name_of_a_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    os.mkfifo(pipe)
    held = os.open(pipe, os.O_RDWR)  # so that a reader would not wait for somebody who writes
    os.write(held, b"PK")
    try:
        with pytest.raises(RequestError, match=f"{pipe.name}: found a folder, a pipe or"):
            open_state(tmp_path, "deepspeed")
    finally:
        os.close(held)


def test_what_is_as_deepspeed_writes_it_is_read(fake: Fake) -> None:
    found = fake.read()
    assert (found.step, found.optimizer_steps) == (4, 4)
    assert {"a", "b"} <= set(found.names())
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        tensor = found.read("a", kind)
        assert tensor is not None
        assert tensor.numel() == 6


def test_whatever_is_missing_or_another_thing_is_named_with_its_file(fake: Fake) -> None:
    refused, values = 0, itertools.cycle(WRONG)
    for name, content in fake.files.items():
        for path in paths(content):
            for value in (..., next(values), next(values), next(values)):
                torch.save(changed(content, path, value), fake.folder / name)
                said = fake.refusal()
                assert not said or str(fake.folder) in said, (name, path, value)
                refused += bool(said)
        torch.save(content, fake.folder / name)
    assert refused > 20
    fake.read()


def test_a_file_that_is_cut_off_or_changed_is_named(fake: Fake) -> None:
    for name in fake.files:
        file = fake.folder / name
        whole = file.read_bytes()
        for part in range(8):
            file.write_bytes(whole[: len(whole) * part // 8])
            with pytest.raises(RequestError, match=file.name):
                fake.read()
        for place in range(0, len(whole), len(whole) // 16):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
            said = fake.refusal()
            assert not said or str(fake.folder) in said
        file.write_bytes(whole)


@pytest.mark.parametrize("fake", ["stage 3"], indirect=True)
@pytest.mark.parametrize(
    ("file", "path", "value", "said"),
    [
        (0, ("param_shapes",), ..., "param_shapes: found nothing, expected a list"),
        (0, ("global_steps",), -3, "global_steps: found -3, expected a whole number from 0 on"),
        (0, ("param_shapes", 0, "a"), [2, "3"], "param_shapes.0.a.1: found '3', expected a number"),
        (
            1,
            ("optimizer_state_dict", "fp32_flat_groups", 0),
            torch.ones(2),
            "optimizer_state_dict.fp32_flat_groups.0: found a tensor of shape (2,), "
            "expected a flat tensor of 3 elements or more",
        ),
        (
            2,
            ("optimizer_state_dict", "optimizer_state_dict", "state", 0, "exp_avg"),
            torch.ones(1).expand(1 << 40),
            "optimizer_state_dict.optimizer_state_dict.state.0.exp_avg: found a tensor of shape "
            "(1099511627776,), expected a plain tensor",
        ),
    ],
)
def test_what_was_found_and_expected_is_said(
    fake: Fake, file: int, path: tuple[Any, ...], value: Any, said: str
) -> None:
    name = list(fake.files)[file]
    torch.save(changed(fake.files[name], path, value), fake.folder / name)
    with pytest.raises(RequestError) as refused:
        fake.read()
    assert str(refused.value) == f"{fake.folder / name}: {said}; it is not as DeepSpeed writes it"


def test_sixteen_bits_without_zero_are_refused_as_what_they_are(tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 writes these keys at stage 0 with its bf16 or fp16 block."""
    optimizer = {"optimizer_state_dict": {"state": {}, "param_groups": []}, "fp32_groups": [[torch.ones(3)]]}
    content = {"global_steps": 4, "module": {"a": torch.ones(3).bfloat16()}, "optimizer": optimizer}
    torch.save(content, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(RequestError, match="found 16-bit weights without ZeRO, whose masters have"):
        open_state(tmp_path, "deepspeed").read("a", "exp_avg")
