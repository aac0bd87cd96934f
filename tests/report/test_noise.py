from __future__ import annotations

import math
import random

import pytest

from xtrain.report.noise import (
    SINGLE_RUN_NOISE,
    SMALLEST_NOISE,
    compare_speeds,
    median_error,
    student_quantile,
)


def test_a_lane_slowed_by_a_tenth_is_slower_than_repeats_that_differ_by_a_little() -> None:
    rates = [1000.0, 1012.0, 991.0]
    found = compare_speeds([0.9 * rate for rate in (1003.0, 995.0, 1009.0)], rates)
    assert found.ratio == pytest.approx(0.9, abs=0.005)
    assert not found.is_noise


def test_the_same_lane_twice_is_within_noise() -> None:
    assert compare_speeds([1000.0, 1012.0, 991.0], [1005.0, 990.0, 1010.0]).is_noise
    assert compare_speeds([1000.0], [1000.0]).is_noise


def test_restless_repeats_hide_a_tenth() -> None:
    assert compare_speeds([900.0, 990.0, 810.0], [1000.0, 1100.0, 900.0]).is_noise


def test_single_runs_are_not_told_apart_below_a_bound() -> None:
    inside, outside = 1 + 0.9 * SINGLE_RUN_NOISE, 1 + 1.1 * SINGLE_RUN_NOISE
    assert compare_speeds([1000 * inside], [1000.0]).is_noise
    assert not compare_speeds([1000 * outside], [1000.0]).is_noise
    assert compare_speeds([1000 * outside], [1000.0], unrest=0.1).is_noise


def test_repeats_that_are_all_equal_leave_a_smallest_noise() -> None:
    assert compare_speeds([1000.0] * 3, [1000.0 * (1 + SMALLEST_NOISE / 2)] * 3).is_noise


def test_faster_and_slower_mirror_each_other() -> None:
    a, b = [100.0, 101.0, 99.0], [120.0, 119.0, 121.0]
    forth, back = compare_speeds(a, b), compare_speeds(b, a)
    assert forth.ratio == pytest.approx(1 / back.ratio)
    assert forth.noise == pytest.approx(back.noise)
    assert forth.is_noise is back.is_noise is False


@pytest.mark.parametrize("repeats", [2, 3, 5])
def test_equal_lanes_are_told_apart_no_more_often_than_one_time_in_twenty(repeats: int) -> None:
    """2,000 pairs of lanes with normal repeats: the rule is a 95% interval, and keeps its word."""
    draw = random.Random(7)

    def rates() -> list[float]:
        return [math.exp(draw.gauss(7, 0.03)) for _ in range(repeats)]

    alarms = sum(not compare_speeds(rates(), rates()).is_noise for _ in range(2000))
    assert 0.03 < alarms / 2000 < 0.07


@pytest.mark.parametrize("lanes", [3, 5, 10])
def test_among_equal_lanes_one_is_called_slower_in_at_most_one_comparison_of_twenty(lanes: int) -> None:
    """1,000 comparisons of lanes with 3 normal repeats, each lane against the fastest, as verdicts do."""
    draw = random.Random(11)

    def rates() -> list[float]:
        return [math.exp(draw.gauss(7, 0.03)) for _ in range(3)]

    def alarms() -> bool:
        *others, best = sorted((rates() for _ in range(lanes)), key=math.prod)
        return any(not compare_speeds(one, best, lanes=lanes).is_noise for one in others)

    assert sum(alarms() for _ in range(1000)) / 1000 < 0.07


def test_lanes_that_ran_once_are_told_apart_the_less_the_more_they_are() -> None:
    few, many = (compare_speeds([1000.0], [1000.0], 0.1, lanes).noise for lanes in (2, 10))
    assert few == pytest.approx(math.expm1(0.196), rel=1e-3)
    assert many > 1.5 * few


@pytest.mark.parametrize(
    ("risk", "degrees", "quantile"),
    [(0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 3, 3.182), (0.05, 10, 2.228), (0.01, 4, 4.604)],
)
def test_quantiles_are_those_of_the_tables(risk: float, degrees: int, quantile: float) -> None:
    assert student_quantile(risk, degrees) == pytest.approx(quantile, abs=5e-4)


def test_the_error_of_a_median_falls_with_the_steps() -> None:
    few, many = median_error(90, 100, 110, 10), median_error(90, 100, 110, 1000)
    assert few == pytest.approx(10 * many)
    assert median_error(100, 100, 100, 5) == 0
