"""Several ranks, one checkpoint: each writes its share, and what goes wrong on one is everybody's."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest
import torch

from tests.checkpoints.test_format import state
from xtrain.checkpoints.format import Checkpoint
from xtrain.checkpoints.saving import Save, Writing
from xtrain.checkpoints.shares import Shard, plan_files, share_out
from xtrain.checkpoints.tensorfile import Shape
from xtrain.checkpoints.writer import begin, finish_files, write_pieces
from xtrain.contract import StateForm, StateKey, StateKind, StatePiece

SHAPES: dict[str, Shape] = {
    "embedding": (100, 8),
    **{f"block.{index}": (16, 8 + index) for index in range(9)},
    "scale": (),
}
KINDS: tuple[StateKind, ...] = ("weight", "exp_avg", "exp_avg_sq")


def elements(shards: list[Shard], rank: int) -> int:
    return sum(math.prod(shape) for shard in shards if shard.rank == rank for shape in shard.shapes.values())


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
def test_each_parameter_has_one_owner_and_no_rank_more_than_its_part_and_one_parameter(world: int) -> None:
    shards = share_out(SHAPES, world)
    names = [name for shard in shards for name in shard.shapes]
    assert sorted(names) == sorted(SHAPES)
    total, largest = elements(share_out(SHAPES, 1), 0), math.prod(SHAPES["embedding"])
    assert max(elements(shards, rank) for rank in range(world)) <= total / world + largest
    assert shards == share_out(dict(reversed(SHAPES.items())), world)


def test_a_share_is_cut_into_files_and_a_parameter_is_not() -> None:
    shards = share_out(SHAPES, 1, shard_bytes=4 * 300)
    assert [shard.label for shard in shards] == [f"{n:05d}-of-00009" for n in range(1, 10)]
    assert list(shards[0].shapes) == ["embedding"]
    assert all(elements([shard], 0) <= 300 for shard in shards[1:])


def values(name: str, kind: StateKind) -> torch.Tensor:
    return torch.arange(math.prod(SHAPES[name])).reshape(SHAPES[name]) + float(hash((name, kind)) % 1000)


LAYOUT = {(name, kind): StateForm(shape) for name, shape in SHAPES.items() for kind in KINDS}


def exported(rank: int, world: int, seen: list[int] | None = None) -> Iterator[StatePiece]:
    """A rank's part of every tensor, flat, as ZeRO cuts them; what is too short is the last rank's.

    `seen` gets how many of the values yielded before are still alive.
    """
    alive: list[weakref.ref[torch.Tensor]] = []
    for name in SHAPES:
        for kind in KINDS:
            whole = values(name, kind).flatten()
            begin, end = (whole.numel() * part // world for part in (rank, rank + 1))
            piece = StatePiece(name, kind, whole[begin:end].clone(), begin)
            alive.append(weakref.ref(piece.value))
            del whole
            if begin < end:
                yield piece
            del piece
            if seen is not None:
                seen.append(sum(ref() is not None for ref in alive))


def test_no_more_than_one_tensor_is_held_while_pieces_are_written(tmp_path: Path) -> None:
    seen = list[int]()
    write_pieces(tmp_path, plan_files(LAYOUT, 1), exported(0, 1, seen))
    assert max(seen) <= 1


def saves(folder: Path, world: int, layout: dict[StateKey, StateForm] = LAYOUT) -> list[Save]:
    partial, plan = begin(folder, 5), plan_files(layout, world)
    return [
        Save(
            partial,
            plan,
            rank,
            world,
            state(5, world=world, extras=[{}] * world) if rank == 0 else None,
            before_commit=lambda: None,
            after_commit=lambda: None,
        )
        for rank in range(world)
    ]


def assert_whole(checkpoint: Checkpoint) -> None:
    checkpoint.check(hashes=True)
    reader = checkpoint.reader()
    for name, kind in LAYOUT:
        found = reader.read(name, kind)
        assert found is not None
        assert torch.equal(found, values(name, kind))


def test_ranks_write_pieces_at_the_same_time_and_the_first_commits_when_all_have(tmp_path: Path) -> None:
    writing = [Writing(save, list(exported(save.rank, 3))) for save in saves(tmp_path, 3)]
    for one in writing:
        one.start()
    for one in writing:
        one.end(30)
        assert one.problem is None
    checkpoint = Checkpoint(tmp_path / "step-00000005", 5)
    assert_whole(checkpoint)
    assert len(list(checkpoint.path.glob("model-*-of-00003.safetensors"))) == 3


def test_files_are_the_same_bytes_whoever_holds_which_piece(tmp_path: Path) -> None:
    """And so are their hashes: one process or three, with the same shares."""
    contents = []
    for holders in (1, 3):
        plan, folder = plan_files(LAYOUT, 3), tmp_path / str(holders)
        folder.mkdir()
        written = [write_pieces(folder, plan, exported(rank, holders)) for rank in range(holders)]
        for rank in range(3):
            finish_files(folder, plan, rank, written)
        contents.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert contents[0] == contents[1]


def test_a_file_with_a_missing_piece_is_not_finished(tmp_path: Path) -> None:
    first, second = saves(tmp_path, 2)
    assert first.write(exported(0, 2)) is None
    assert second.write(piece for piece in exported(1, 2) if piece.name != "embedding") is None
    problem = first.finish()
    assert problem is not None
    assert "bytes of tensors came, expected" in problem


def test_a_rank_with_another_state_is_told_apart(tmp_path: Path) -> None:
    """It would write to other places of the files."""
    first, second = saves(tmp_path, 2)
    layout = {key: form for key, form in LAYOUT.items() if key[1] == "weight"}
    assert first.write(exported(0, 2)) is None
    other = replace(second, plan=plan_files(layout, 2))
    assert other.write(piece for piece in exported(1, 2) if piece.kind == "weight") is None
    assert first.finish() == "rank 1 has other tensors than rank 0"


def too_long(save: Save) -> Iterator[StatePiece]:
    yield StatePiece("scale", "weight", torch.ones(2))


def test_a_piece_that_does_not_fit_into_its_tensor_is_refused(tmp_path: Path) -> None:
    (save,) = saves(tmp_path, 1)
    assert save.write(too_long(save)) == "scale: 8 bytes from byte 0 on do not fit"


def test_the_failure_of_one_rank_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = saves(tmp_path, 2)
    assert (second.write(too_long(second)) or "").startswith("rank 1: scale: ")
    assert first.write(exported(0, 2)) is None
    problem = first.finish()
    assert problem is not None
    assert problem.startswith("rank 1: scale: ")
    first.abandon(problem)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_failed_draws_the_rest_all_the_same(tmp_path: Path) -> None:
    """Drawing may be collective: the other ranks would wait for ever."""
    drawn: list[str] = []
    save = saves(tmp_path, 1)[0]

    def pieces() -> Iterator[StatePiece]:
        yield from too_long(save)
        for name in SHAPES:
            drawn.append(name)
            yield StatePiece(name, "weight", values(name, "weight"))

    assert save.write(pieces()) is not None
    assert drawn == list(SHAPES)


def test_a_host_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    save = saves(tmp_path, 2)[1]
    save.partial.rmdir()
    problem = save.write(exported(1, 2))
    assert problem is not None
    assert problem.startswith("rank 1: ")
    assert (
        f"does not see {tmp_path}; the run directory must be on a file system that all hosts share" in problem
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_part_that_never_comes_is_not_waited_for_longer_than_asked(tmp_path: Path, rank: int) -> None:
    own = saves(tmp_path, 2)[rank]
    writing = Writing(own, list(exported(rank, 2)))
    writing.start()
    ending: Thread = writing
    writing.end(0)
    assert not ending.is_alive()
    assert (writing.problem or "").endswith("not every process wrote its share")
    assert [path.name for path in tmp_path.iterdir()] == ([] if rank == 0 else [own.partial.name])
