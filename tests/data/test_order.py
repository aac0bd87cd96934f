from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtrain.data.hashing import key, mix
from xtrain.data.order import Mask, Permutation

ORDER_OF_TEN = [1, 0, 8, 7, 3, 9, 5, 6, 2, 4]
ORDER_OF_THOUSAND = "d9d5f0faf5a20bbbba2bb8b4235c312ba09b0b1becee6724c751e63a51b57321"


def epoch(count: int, seed: int, number: int = 0) -> list[int]:
    first = number * count
    return [int(i) for i in Permutation(count, seed)(np.arange(first, first + count))]


def test_mix_is_the_published_splitmix64() -> None:
    # The generator's first outputs from state 1234567, as in the reference implementation.
    states = 1234567 + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_keys_differ_by_every_part() -> None:
    keys = [key(1, "a"), key(1, "b"), key(2, "a"), key("a", 1), key(1), key(1, "a", 0)]
    assert len(set(map(int, keys))) == 6


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 16, 97, 100, 101, 1023, 1024, 1025, 62_000])
def test_every_epoch_has_every_number_once(count: int) -> None:
    for number in (0, 1, 10**6):
        assert sorted(epoch(count, seed=7, number=number)) == list(range(count))


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**70), number=st.integers(0, 2**40))
@settings(max_examples=100, deadline=None)
def test_any_epoch_of_any_count_and_seed_is_a_permutation(count: int, seed: int, number: int) -> None:
    assert sorted(epoch(count, seed, number)) == list(range(count))


def test_order_differs_by_epoch_and_by_seed() -> None:
    orders = {tuple(epoch(50, seed, number)) for seed in range(5) for number in range(5)}
    assert len(orders) == 25


def test_small_counts_reach_all_their_orders_about_equally_often() -> None:
    shuffle = Permutation(3, seed=0)
    orders = shuffle(np.arange(3 * 6000)).reshape(6000, 3)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 850  # of 1000 expected each; the standard deviation is 29
    assert counts.max() < 1150


def test_a_long_order_looks_shuffled() -> None:
    order = np.array(epoch(100_000, seed=3))
    places = np.arange(100_000)
    assert abs(np.corrcoef(places, order)[0, 1]) < 0.015  # standard deviation 0.003
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.015


def test_any_place_can_be_asked_for_alone() -> None:
    shuffle = Permutation(1000, seed=5)
    places = np.array([10**15 + 3, 0, 999, 1000])
    assert shuffle(places).tolist() == [int(shuffle(place[None])[0]) for place in places]


def test_the_order_never_changes() -> None:
    """A resumed run must meet the same data after an upgrade: these numbers are a promise."""
    assert epoch(10, seed=1234) == ORDER_OF_TEN
    digest = hashlib.sha256(Permutation(1000, 1234)(np.arange(5000)).astype("<i8").tobytes()).hexdigest()
    assert digest == ORDER_OF_THOUSAND


def test_no_numbers_cannot_be_permuted() -> None:
    with pytest.raises(ValueError, match="cannot permute 0 numbers"):
        Permutation(0, seed=1)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_mask_leaves_its_share_and_differs_by_sequence_and_seed(share: float) -> None:
    counted = Mask(share, seed=1, seq_len=100).counted(np.arange(1000))
    assert abs(counted.mean() - (1 - share)) < 0.01  # 100,000 draws: standard deviation <= 0.0015
    assert not (counted[0] == counted[1]).all()
    assert not (counted == Mask(share, seed=2, seq_len=100).counted(np.arange(1000))).all()


def test_mask_of_a_sequence_does_not_depend_on_its_company() -> None:
    mask = Mask(0.5, seed=1, seq_len=20)
    assert (mask.counted(np.array([7, 3]))[1] == mask.counted(np.array([3]))[0]).all()


def test_every_sequence_keeps_a_target_however_many_are_masked() -> None:
    counted = Mask(0.999, seed=1, seq_len=4).counted(np.arange(500))
    assert counted.any(axis=1).all()
    assert counted.sum() < 510
