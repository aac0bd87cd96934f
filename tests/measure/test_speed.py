from __future__ import annotations

import pytest

from xtrain.measure.speed import Speed, SpeedMeter, SplitMeter, TimeSplit, imbalance
from xtrain.records.metrics import StepRecord


def timed(*seconds: float | None, spans: dict[str, float] | None = None) -> list[StepRecord]:
    return [StepRecord(i + 1, 1.0, 1e-3, 1.0, 100, s, False, spans=spans) for i, s in enumerate(seconds)]


def measure_speed(records: list[StepRecord], warmup_steps: int) -> Speed | None:
    meter = SpeedMeter(warmup_steps)
    for record in records:
        meter.add(record)
    return meter.speed()


def split_time(records: list[StepRecord]) -> TimeSplit | None:
    meter = SplitMeter()
    for record in records:
        meter.add(record)
    return meter.split()


def test_warm_up_and_traced_steps_do_not_count() -> None:
    records = timed(100.0, 100.0, 1.0, 1.0) + timed(50.0, spans={"forward": 1.0}) + timed(1.0)
    speed = measure_speed(records, warmup_steps=2)
    assert speed is not None
    assert (speed.tokens_per_second, speed.p10, speed.p90, speed.samples) == (100.0, 100.0, 100.0, 3)
    assert (speed.warmup_steps_left_out, speed.traced_steps_left_out) == (2, 1)


def test_the_spread_is_the_tenth_and_the_ninetieth_percentile() -> None:
    speed = measure_speed(timed(*(100 / rate for rate in range(1, 12))), warmup_steps=0)
    assert speed is not None
    assert speed.tokens_per_second == pytest.approx(6)
    assert speed.p10 == pytest.approx(2)
    assert speed.p90 == pytest.approx(10)


def test_an_even_number_of_steps_in_any_order_has_the_median_between_the_middle_two() -> None:
    speed = measure_speed(timed(100 / 4, 100 / 1, 100 / 3, 100 / 2), warmup_steps=0)
    assert speed is not None
    assert speed.tokens_per_second == pytest.approx(2.5)


def test_one_step_is_its_own_spread() -> None:
    speed = measure_speed(timed(2.0), warmup_steps=0)
    assert speed is not None
    assert speed.p10 == speed.tokens_per_second == speed.p90 == 50.0


@pytest.mark.parametrize("records", [[], timed(1.0, 1.0), timed(1.0, 1.0, None), timed(1.0, 1.0, 0.0)])
def test_nothing_to_count_is_none_and_not_zero(records: list[StepRecord]) -> None:
    assert measure_speed(records, warmup_steps=2) is None


def test_time_outside_every_span_is_other_and_shares_add_up_to_one() -> None:
    records = timed(9.0) + timed(8.0, 8.0, spans={"data": 1.0, "forward": 2.0, "backward": 4.0})
    assert split_time(records) == TimeSplit(
        seconds={"data": 1, "forward": 2, "backward": 4, "other": 1},
        shares={"data": 0.125, "forward": 0.25, "backward": 0.5, "other": 0.125},
        traced_steps=2,
    )


def test_other_is_never_negative_when_spans_exceed_the_step() -> None:
    split = split_time(timed(1.0, spans={"forward": 1.5, "backward": 0.5}))
    assert split is not None
    assert split.shares["other"] == 0
    assert sum(split.shares.values()) == pytest.approx(1)
    assert tuple(split.seconds) == ("forward", "backward", "other")


def test_without_traced_steps_there_is_no_split() -> None:
    assert split_time(timed(1.0, 1.0)) is None


def test_the_imbalance_is_how_much_longer_the_slowest_rank_computes_than_the_mean() -> None:
    ranks = [{"forward": 1.0, "backward": 9.0}, {"forward": 1.5, "backward": 1.0}, {"forward": 0.5}]
    assert imbalance(ranks) == pytest.approx(0.5)
    assert imbalance(ranks[:1]) is None
    assert imbalance([{"forward": 1.0}, {}]) is None
    assert imbalance([{"forward": 1.0}, {"forward": -1.0}]) is None
