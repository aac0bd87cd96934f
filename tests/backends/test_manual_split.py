"""How many blocks each device gets: from counts, from fractions, or from what fits."""

from __future__ import annotations

import math

import pytest
import torch

from backends.manual.counts import split_blocks
from backends.manual.devices import Cpu
from backends.manual.estimate import StepBytes
from backends.manual.split import fit_blocks
from xtrain.errors import RequestError


class Limited(Cpu):
    """Room for that many blocks of 100 bytes, when a tenth stays free; each its own device."""

    def __init__(self, index: int, blocks: float) -> None:
        self.torch_device = torch.device("cuda", index)
        self.blocks = blocks

    def limit_bytes(self) -> int | None:
        return math.ceil(self.blocks * 100 / 0.9)


class Room(Limited):
    """The same, for blocks of a MiB."""

    def __init__(self, blocks: float, index: int) -> None:
        super().__init__(index, blocks * (1 << 20) / 100)


def needed(blocks: int, home: int = 0, recomputed: int = 0) -> StepBytes:
    return StepBytes([100] * blocks, home, recomputed)


@pytest.mark.parametrize(
    ("split", "blocks", "expected"),
    [
        ([1, 3], 4, [1, 3]),
        ([2, 1, 1], 4, [2, 1, 1]),
        ([0.5, 0.5], 5, [2, 3]),
        ([0.75, 0.25], 4, [3, 1]),
        ([0.1, 0.9], 4, [0, 4]),
        ([1 / 3, 1 / 3, 1 / 3], 7, [2, 3, 2]),
    ],
)
def test_counts_are_taken_and_fractions_rounded_so_that_every_block_has_a_place(
    split: list[int] | list[float], blocks: int, expected: list[int]
) -> None:
    assert split_blocks(split, blocks) == expected


@pytest.mark.parametrize("split", [[2, 3], [1, 1, 1]])
def test_counts_that_do_not_sum_to_the_blocks_are_refused(split: list[int]) -> None:
    with pytest.raises(
        RequestError, match=rf"found \[.*\], which sum to {sum(split)}, expected .* the 4 blocks"
    ):
        split_blocks(split, 4)


def test_each_device_takes_what_fits_and_the_last_one_what_is_left() -> None:
    devices = [Limited(0, 2.5), Limited(1, 1.0), Cpu()]
    assert fit_blocks(needed(6), devices) == [2, 1, 3]
    assert fit_blocks(needed(2), devices) == [2, 0, 0]


def test_stem_head_and_a_group_being_recomputed_take_room_of_the_first_device() -> None:
    devices = [Limited(0, 4.5), Cpu()]
    assert fit_blocks(needed(6), devices) == [4, 2]
    assert fit_blocks(needed(6, home=100), devices) == [3, 3]
    assert fit_blocks(needed(6, home=100, recomputed=200), devices) == [1, 5]
    assert fit_blocks(needed(6, home=450), devices) == [0, 6]


def test_a_group_being_recomputed_takes_room_of_every_device_that_has_blocks() -> None:
    devices = [Limited(0, 4.5), Limited(1, 4.5), Cpu()]
    assert fit_blocks(needed(8), devices) == [4, 4, 0]
    assert fit_blocks(needed(8, recomputed=200), devices) == [2, 2, 4]


def test_blocks_that_find_no_room_are_refused_with_the_room_there_is() -> None:
    devices = [Limited(0, 2.5), Limited(1, 1.5)]
    assert fit_blocks(needed(3), devices) == [2, 1]
    with pytest.raises(RequestError) as refused:
        fit_blocks(StepBytes([1 << 20] * 5, 0, 0), [Room(2.5, 0), Room(1.5, 1)])
    assert str(refused.value) == (
        "manual.split: auto: found room for 3 of the 5 blocks (2 on cuda:0, 1 on cuda:1); by the estimate "
        "2.0 MiB are missing: use a smaller batch.micro, memory.checkpointing or memory.offload, name more "
        "devices, or name counts, which are not checked"
    )


def test_stem_and_head_that_do_not_fit_on_the_first_device_are_refused() -> None:
    with pytest.raises(RequestError, match=r"split: auto: stem and head do not fit on cuda:0; by the"):
        fit_blocks(needed(6, home=1000), [Limited(0, 4.5), Cpu()])


def test_the_last_device_is_looked_at_too_when_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "limit_bytes", lambda cpu: 250)
    assert fit_blocks(needed(2), [Limited(0, 0.5), Cpu()]) == [0, 2]
    with pytest.raises(RequestError, match=r"room for 2 of the 3 blocks \(0 on cuda:0, 2 on cpu\)"):
        fit_blocks(needed(3), [Limited(0, 0.5), Cpu()])


def test_a_device_that_stands_twice_has_its_room_once() -> None:
    device = Limited(0, 2.0)
    assert fit_blocks(needed(5), [device, device, Cpu()]) == [2, 0, 3]


def test_one_device_that_stands_several_times_gives_each_place_alike() -> None:
    assert fit_blocks(needed(4), [Cpu(), Cpu()]) == [2, 2]
    with pytest.raises(RequestError, match="room for 2 of the 4"):
        fit_blocks(needed(4), [Limited(0, 2.0), Limited(0, 2.0)])
