from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xtrain.contract import IGNORED_TARGET, Batch
from xtrain.data import Dataset
from xtrain.errors import RequestError

Opener = Callable[..., Dataset]
"""open_data of 200 sequences of 10, of which 2 are held out; keywords change the spec."""


@pytest.fixture
def counting(tmp_path: Path, opened: Opener) -> Opener:
    """Data whose i-th token is i, so that every token tells where it is from: 200 sequences of 10."""
    path = tmp_path / "count.npy"
    np.save(path, np.arange(2001, dtype=np.uint16))

    def open_counting(**keys: object) -> Dataset:
        return opened(source="tokens", path=str(path), **keys)

    return open_counting


def rows_of(batches: list[Batch]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in batches for row in batch.tokens.tolist()]


def test_targets_are_the_next_tokens_and_shapes_are_fixed(counting: Opener) -> None:
    for batch in counting(batch=8, micro=2).micro_batches(3, 0, 1):
        assert batch.tokens.shape == batch.targets.shape == (2, 10)
        assert batch.tokens.dtype == batch.targets.dtype == np.int64
        assert batch.tokens.flags.c_contiguous
        assert batch.targets.flags.c_contiguous
        assert (batch.targets == batch.tokens + 1).all()
        assert (batch.tokens[:, 0] % 10 == 0).all()


def test_the_batch_holds_the_announced_sequences_in_order(counting: Opener) -> None:
    data = counting()
    firsts = [row[0] // 10 for row in rows_of(data.micro_batches(4, 0, 1))]
    assert firsts == data.sequence_ids(4).tolist()


def test_every_training_sequence_comes_once_per_epoch_and_held_out_ones_never(counting: Opener) -> None:
    data = counting(batch=9, micro=3, held_out=0.01)  # 198 = 22 x 9
    epochs = [
        [row for step in range(22) for row in rows_of(data.micro_batches(step + 22 * e, 0, 1))]
        for e in (0, 1)
    ]
    expected = [tuple(range(10 * i, 10 * i + 10)) for i in range(198)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]


def test_epochs_follow_each_other_also_where_a_batch_straddles_them(counting: Opener) -> None:
    data = counting(batch=8)
    stream = np.concatenate(
        [data.sequence_ids(step) for step in range(198)]
    )  # eight epochs, 24.75 steps each
    for epoch in stream.reshape(8, 198):
        assert sorted(epoch) == list(range(198))


def test_the_global_batch_is_the_same_set_for_any_world_size(counting: Opener) -> None:
    data = counting(batch=16, micro=2)
    for step in (0, 7):
        sets = [
            sorted(row for rank in range(world) for row in rows_of(data.micro_batches(step, rank, world)))
            for world in (1, 2, 4)
        ]
        assert sets[0] == sets[1] == sets[2]
        assert len(set(sets[0])) == 16


def test_accumulation_four_has_the_micro_batches_of_two_ranks_with_two_each(counting: Opener) -> None:
    data = counting(batch=8, micro=2)
    alone = [rows_of([batch]) for batch in data.micro_batches(5, 0, 1)]
    ranks = [[rows_of([batch]) for batch in data.micro_batches(5, rank, 2)] for rank in (0, 1)]
    assert alone == [ranks[0][0], ranks[1][0], ranks[0][1], ranks[1][1]]


def test_a_batch_that_does_not_divide_is_refused(counting: Opener) -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        counting(batch=8, micro=2).micro_batches(0, 0, 3)


def test_step_a_million_is_addressed_and_in_its_place_of_its_epoch(counting: Opener) -> None:
    far = rows_of(counting().micro_batches(10**6, 0, 1))
    data = counting()
    data.micro_batches(0, 0, 1)
    assert rows_of(data.micro_batches(10**6, 0, 1)) == far
    begin = 8 * 10**6 // 198 * 198  # of the epoch in which that step falls
    steps = range(begin // 8, (begin + 198) // 8 + 1)
    ids = np.concatenate([data.sequence_ids(step) for step in steps])[begin % 8 :][:198]
    assert 10**6 in steps
    assert sorted(ids) == list(range(198))


def test_seeds_order_the_same_sequences_differently(counting: Opener) -> None:
    one, two = counting(seed=1), counting(seed=2)
    assert one.sequence_ids(0).tolist() != two.sequence_ids(0).tolist()
    assert one.content_hash == two.content_hash


# --- held out ----------------------------------------------------------------------------------


def held_out_firsts(data: Dataset, world: int) -> list[int]:
    parts = [list(data.held_out(rank, world)) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    real = [(b, i) for part in parts for b in part for i in range(len(b.tokens)) if (b.targets[i] >= 0).any()]
    assert all((b.targets[i] == b.tokens[i] + 1).all() for b, i in real)
    return sorted(int(b.tokens[i, 0]) // 10 for b, i in real)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.555])
def test_held_out_sequences_are_the_last_once_each_as_many_batches_per_rank(
    counting: Opener, world: int, share: float
) -> None:
    data = counting(held_out=share)
    assert data.held_out_sequences == int(200 * share)
    assert held_out_firsts(data, world) == list(range(200 - data.held_out_sequences, 200))


def test_padding_has_no_targets_and_keeps_the_shape(counting: Opener) -> None:
    batches = counting(held_out=0.025, micro=4).held_out(1, 2)  # 5 sequences: rank 0 has 4, rank 1 has 1
    assert len(batches) == 1
    assert batches[0].tokens.shape == (4, 10)
    assert (batches[0].targets[1:] == IGNORED_TARGET).all()
    assert (batches[0].targets[0] >= 0).all()


def test_held_out_batches_are_a_sequence(counting: Opener) -> None:
    batches = counting(held_out=0.1).held_out(0, 1)
    assert len(batches) == len(list(batches)) == 10
    assert rows_of([batches[-1]]) == rows_of(list(batches[9:]))
    with pytest.raises(IndexError):
        batches[10]


def test_a_small_share_still_holds_out_one_sequence_and_none_holds_out_none(counting: Opener) -> None:
    assert counting(held_out=0.0001).held_out_sequences == 1
    nothing = counting(held_out=0.0)
    assert (nothing.sequences, nothing.held_out_sequences, len(nothing.held_out(0, 2))) == (200, 0, 0)


# --- masks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
def test_target_tokens_counts_the_global_batch_without_its_tokens(opened: Opener, world: int) -> None:
    data = opened(masked=0.3)
    counts = set()
    for step in range(20):
        batches = [batch for rank in range(world) for batch in data.micro_batches(step, rank, world)]
        assert data.target_tokens(step) == sum(int((b.targets != IGNORED_TARGET).sum()) for b in batches)
        counts.add(data.target_tokens(step))
    assert len(counts) > 5  # unequal, as real data is


def test_masking_hides_targets_and_leaves_tokens(opened: Opener) -> None:
    plain, masked = opened(), opened(masked=0.3)
    pairs = list(zip(plain.micro_batches(2, 0, 1), masked.micro_batches(2, 0, 1), strict=True))
    for one, other in pairs:
        kept = other.targets != IGNORED_TARGET
        assert (one.tokens == other.tokens).all()
        assert (one.targets[kept] == other.targets[kept]).all()
    assert plain.target_tokens(2) == 80
    assert 30 <= masked.target_tokens(2) < 80


def test_a_sequence_has_the_same_mask_in_every_epoch_and_place(opened: Opener) -> None:
    masks: dict[int, set[bytes]] = {}
    data = opened(masked=0.5)
    for step in range(50):
        targets = np.concatenate([batch.targets for batch in data.micro_batches(step, 0, 1)])
        for sequence, row in zip(data.sequence_ids(step).tolist(), targets, strict=True):
            masks.setdefault(sequence, set()).add((row == IGNORED_TARGET).tobytes())
    assert len(masks) == 198
    assert {len(seen) for seen in masks.values()} == {1}


def test_a_batch_always_keeps_a_target(opened: Opener) -> None:
    data = opened(masked=0.9999, batch=1, micro=1)
    assert min(data.target_tokens(step) for step in range(200)) == 1


# --- what it says ------------------------------------------------------------------------------


def test_description_tells_source_and_sizes(opened: Opener) -> None:
    assert opened().description == "synthetic, 2,001 tokens, 200 sequences of 10, 2 held out"


def test_too_little_data_names_how_much_there_is_and_how_much_is_needed(opened: Opener) -> None:
    with pytest.raises(RequestError) as error:
        opened(tokens=50, held_out=0.1)
    assert str(error.value) == (
        "data: found synthetic, 50 tokens, which makes 4 sequences of 10; "
        "batch.global 8 with data.held_out 0.1 needs 9 sequences, 91 tokens. "
        "Give more data, or lower batch.global or data.seq_len"
    )
    assert opened(tokens=91, held_out=0.1).sequences == 8
    with pytest.raises(RequestError):
        opened(tokens=90, held_out=0.1)


def test_one_sequence_is_enough_for_a_batch_of_one(opened: Opener) -> None:
    data = opened(tokens=11, batch=1, micro=1)
    assert (data.sequences, data.held_out_sequences) == (1, 0)
    assert [data.sequence_ids(step).tolist() for step in range(3)] == [[0], [0], [0]]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's /proc/self/smaps")
def test_reading_a_mapped_file_at_random_does_not_make_it_resident(tmp_path: Path, opened: Opener) -> None:
    path = tmp_path / "tokens.bin"
    np.random.default_rng(0).integers(0, 250, 8_000_000, dtype=np.uint16).tofile(path)
    data = opened(
        source="tokens", path=str(path), seq_len=128, model={"preset": "gpt2-nano", "vocab_size": 257}
    )
    for step in range(200):
        data.micro_batches(step, 0, 1)
    assert resident_bytes_of(path) < path.stat().st_size // 4


def resident_bytes_of(path: Path) -> int:
    """The resident part of this process's maps of a file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0] and not line.split(" ")[0].endswith(":"):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells")
def test_the_system_is_told_not_to_read_ahead_of_what_is_taken_at_random(
    counting: Opener, tmp_path: Path
) -> None:
    data = counting()
    flags = [line for line in _map_of(tmp_path / "count.npy") if line.startswith("VmFlags")]
    assert data.sequences
    assert flags
    assert all(" rr " in f"{line} " for line in flags)


def _map_of(path: Path) -> list[str]:
    """What /proc/self/smaps has of the maps of `path`."""
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return [line for one in maps if str(path) in one for line in one.splitlines()]
