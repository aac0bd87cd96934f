"""The arithmetic of the planted slowness; the runs themselves are measured, not tested."""

from __future__ import annotations

import pytest
import torch

from benchmarks.planted_model import VOCABULARY, build
from benchmarks.planted_slowness import PLAIN, PROBE, SAME, SLOWED, Pair, extra_products, pairs
from tests.report.sample_lanes import compared, lane, run, slowed, steps


def test_the_extra_products_add_a_tenth_of_a_step() -> None:
    assert extra_products(plain_seconds=0.1, probe_seconds=0.1 + PROBE * 0.0005) == 20
    with pytest.raises(SystemExit, match="too busy"):
        extra_products(0.1, 0.1)


def test_only_a_planted_lane_may_differ() -> None:
    runs = [run(slowed(steps(), factor)) for factor in (1.0, 1.001, 0.999)]
    slow = [run(slowed(steps(), 1.1 * factor)) for factor in (1.0, 1.001, 0.999)]
    found = [*pairs(compared(lane(PLAIN, *runs), lane(SAME, *runs[::-1]), lane(SLOWED, *slow)))]
    assert [pair.is_noise for pair in found] == [True, False, False]
    assert all(pair.is_right for pair in found)
    assert not Pair(PLAIN, SAME, 0.1, 0.01, is_noise=False).is_right
    assert not Pair(PLAIN, SLOWED, 0.01, 0.1, is_noise=True).is_right


def test_extra_work_changes_no_logits() -> None:
    torch.manual_seed(1)
    plain, slow = build(), build(extra=3)
    slow.load_state_dict(plain.state_dict())
    tokens = torch.arange(8).view(1, 8)
    assert torch.equal(plain(tokens), slow(tokens))
    assert plain(tokens).shape == (1, 8, VOCABULARY)
