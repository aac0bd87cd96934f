"""Several ranks, one checkpoint: each writes its share, and what goes wrong on one is everybody's."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest
import torch

from tests.checkpoints.test_format import state
from xtrain.checkpoints.format import Checkpoint
from xtrain.checkpoints.saving import Save, Writing
from xtrain.checkpoints.shares import Shard, share_out
from xtrain.checkpoints.tensorfile import Shape
from xtrain.checkpoints.writer import begin, write_share
from xtrain.contract import StateKind, StateTensor

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
    return torch.full(SHAPES[name], float(hash((name, kind)) % 1000))


def exported(rank: int, shards: list[Shard], seen: list[int] | None = None) -> Iterator[StateTensor]:
    """As an engine yields it; `seen` gets how many of the tensors yielded before are still alive."""
    owners = {name: shard.rank for shard in shards for name in shard.shapes}
    alive: list[weakref.ref[torch.Tensor]] = []
    for name in SHAPES:
        for kind in KINDS:
            value = values(name, kind) if owners[name] == rank else None
            tensor = StateTensor(name, kind, value)
            if value is not None:
                alive.append(weakref.ref(value))
            del value
            yield tensor
            del tensor
            if seen is not None:
                seen.append(sum(ref() is not None for ref in alive))


def test_no_more_than_one_tensor_is_held_while_a_share_is_written(tmp_path: Path) -> None:
    shards, seen = share_out(SHAPES, 1), list[int]()
    write_share(tmp_path, shards, exported(0, shards, seen))
    assert max(seen) <= 1


def saves(folder: Path, world: int) -> list[Save]:
    partial, shards = begin(folder, 5), share_out(SHAPES, world)
    return [
        Save(
            partial,
            [shard for shard in shards if shard.rank == rank],
            rank,
            world,
            state(5, world=world, extras=[{}] * world) if rank == 0 else None,
            before_commit=lambda: None,
            after_commit=lambda: None,
        )
        for rank in range(world)
    ]


def test_ranks_write_at_the_same_time_and_the_first_commits_when_all_have(tmp_path: Path) -> None:
    shards = share_out(SHAPES, 3)
    writing = [
        Writing(save, [t for t in exported(save.rank, shards) if t.value is not None])
        for save in saves(tmp_path, 3)
    ]
    for one in writing:
        one.start()
    for one in writing:
        one.end(30)
        assert one.problem is None
    checkpoint = Checkpoint(tmp_path / "step-00000005", 5)
    checkpoint.check(hashes=True)
    reader = checkpoint.reader()
    for name in SHAPES:
        for kind in KINDS:
            found = reader.read(name, kind)
            assert found is not None
            assert torch.equal(found, values(name, kind))
    assert len(list(checkpoint.path.glob("model-*-of-00003.safetensors"))) == 3


def complex_share(save: Save) -> Iterator[StateTensor]:
    name = next(iter(save.shards[0].shapes))
    yield StateTensor(name, "buffer", torch.ones(1, dtype=torch.complex64))


def test_the_failure_of_one_rank_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = saves(tmp_path, 2)
    shards = share_out(SHAPES, 2)
    reason = "has dtype torch.complex64, which a checkpoint cannot hold"
    assert (second.write(complex_share(second)) or "").endswith(reason)
    assert first.write(exported(0, shards)) is None
    problem = first.commit()
    assert problem is not None
    assert problem.startswith("rank 1: ")
    assert problem.endswith(reason)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_failed_draws_the_rest_all_the_same(tmp_path: Path) -> None:
    """Drawing is collective: the other ranks would wait for ever."""
    drawn: list[str] = []
    save = saves(tmp_path, 1)[0]

    def tensors() -> Iterator[StateTensor]:
        yield from complex_share(save)
        for name in SHAPES:
            drawn.append(name)
            yield StateTensor(name, "weight", values(name, "weight"))

    assert save.write(tensors()) is not None
    assert drawn == list(SHAPES)


def test_a_host_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    save = saves(tmp_path, 2)[1]
    save.partial.rmdir()
    problem = save.write(exported(1, share_out(SHAPES, 2)))
    assert problem is not None
    assert problem.startswith("rank 1: ")
    assert (
        f"does not see {tmp_path}; the run directory must be on a file system that all hosts share" in problem
    )


def test_a_share_that_never_comes_is_not_waited_for_longer_than_asked(tmp_path: Path) -> None:
    first = saves(tmp_path, 2)[0]
    writing = Writing(first, [t for t in exported(0, share_out(SHAPES, 2)) if t.value is not None])
    writing.start()
    ending: Thread = writing
    writing.end(0)
    assert not ending.is_alive()
    assert writing.problem == "not every process wrote its share"
    assert list(tmp_path.iterdir()) == []
