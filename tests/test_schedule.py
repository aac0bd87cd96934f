"""Schedules: the documented formulas, and the libraries that have the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.plot_schedules import PLOTS, draw
from xtrain.schedule import factor, learning_rate
from xtrain.spec.tree import WSD, Constant, Cosine, Linear, Schedule, Spec, WarmupDecay

STEPS = 60
PEAK = 3e-4
WARMUPS = (0, 1, 10)
DOCS = Path(__file__).parents[1] / "docs"

ALL: list[Schedule] = [
    Constant(name="constant", warmup=10),
    Linear(name="linear", warmup=10),
    Cosine(warmup=10),
    Cosine(warmup=10, cycles=1.25, min_ratio=0.2),
    WSD(name="wsd", warmup=10, stable=30, decay=20, min_ratio=0.1),
    WarmupDecay(name="warmup-decay", warmup=10, warmup_type="linear"),
    WarmupDecay(name="warmup-decay", warmup=10, warmup_type="log"),
]
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)


def ours(schedule: Schedule, steps: int = STEPS) -> list[float]:
    """The learning rate of each update."""
    spec = Spec.model_validate(
        {
            "model": {"preset": "gpt2-nano"},
            "data": {"source": "synthetic"},
            "batch": {"global": 1},
            "train": {"steps": steps},
            "optimizer": {"lr": PEAK},
            "schedule": schedule.model_dump(),
        }
    )
    rate = learning_rate(spec)
    return [rate(k) for k in range(steps)]


def used_by(make: Callable[[torch.optim.Optimizer], Any], updates: int = STEPS) -> list[float]:
    """The learning rate that a torch optimizer has at each update under another library's scheduler."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = make(optimizer)
    rates = []
    for _ in range(updates):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def close(expected: list[float]) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=PEAK * 1e-12)


# --- the formulas --------------------------------------------------------------------------------


@every_schedule
def test_the_first_update_of_a_warm_up_has_0_and_the_update_after_it_has_the_peak(schedule: Schedule) -> None:
    rates = ours(schedule)
    assert rates[0] == 0.0
    assert rates[10] == pytest.approx(PEAK)
    assert all(low < high for low, high in pairwise(rates[:10]))


@every_schedule
def test_without_warm_up_the_first_update_has_the_peak(schedule: Schedule) -> None:
    assert factor(schedule.model_copy(update={"warmup": 0}), 0, STEPS) == 1.0


@every_schedule
def test_beyond_the_last_step_the_rate_stays_where_it_ended(schedule: Schedule) -> None:
    end = factor(schedule, STEPS, STEPS)
    assert [factor(schedule, k, STEPS) for k in (STEPS + 1, 2 * STEPS, 100 * STEPS)] == [end] * 3


@every_schedule
def test_a_warm_up_longer_than_the_run_only_rises(schedule: Schedule) -> None:
    rates = [factor(schedule.model_copy(update={"warmup": 100}), k, STEPS) for k in range(STEPS)]
    assert rates == sorted(rates)
    assert rates[-1] < 1


@pytest.mark.parametrize(
    ("schedule", "floor"),
    [
        (Linear(name="linear"), 0.0),
        (Cosine(min_ratio=0.1), 0.1),
        (Cosine(min_ratio=0.0), 0.0),
        (WSD(name="wsd", stable=30, decay=20, min_ratio=0.2), 0.2),
        (WarmupDecay(name="warmup-decay"), 0.0),
    ],
)
def test_a_decay_ends_at_its_floor(schedule: Schedule, floor: float) -> None:
    assert factor(schedule, STEPS, STEPS) == pytest.approx(floor, abs=1e-15)


def test_values_by_hand() -> None:
    assert factor(Linear(name="linear", warmup=20), 40, 60) == 0.5
    assert factor(Cosine(warmup=20, min_ratio=0.1), 40, 60) == pytest.approx(0.55)
    assert factor(Cosine(min_ratio=0.0, cycles=1.0), 30, 60) == pytest.approx(0.0)
    assert factor(WSD(name="wsd", warmup=10, stable=30, decay=20), 50, 60) == pytest.approx(0.5)
    log = WarmupDecay(name="warmup-decay", warmup=10, warmup_type="log")
    assert factor(log, 4, 60) == pytest.approx(math.log(5) / math.log(10))


def test_wsd_is_at_the_peak_for_exactly_the_stable_updates() -> None:
    wsd = WSD(name="wsd", warmup=5, stable=10, decay=20, min_ratio=0.1)
    at_peak = [k for k in range(STEPS) if factor(wsd, k, STEPS) == 1.0]
    assert at_peak == list(range(5, 16))  # the decay starts from the peak, at update 15
    assert factor(wsd, 35, STEPS) == pytest.approx(0.1)


# --- Hugging Face --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf() -> Any:
    return pytest.importorskip("transformers.optimization", reason="needs transformers (the dev extra)")


@pytest.mark.parametrize("warmup", WARMUPS)
def test_constant_is_hugging_faces(hf: Any, warmup: int) -> None:
    theirs = used_by(lambda o: hf.get_constant_schedule_with_warmup(o, warmup))
    assert ours(Constant(name="constant", warmup=warmup)) == close(theirs)


@pytest.mark.parametrize("warmup", WARMUPS)
def test_linear_is_hugging_faces(hf: Any, warmup: int) -> None:
    theirs = used_by(lambda o: hf.get_linear_schedule_with_warmup(o, warmup, STEPS))
    assert ours(Linear(name="linear", warmup=warmup)) == close(theirs)


@pytest.mark.parametrize("cycles", [0.5, 1.25, 2.0])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_cosine_is_hugging_faces(hf: Any, warmup: int, cycles: float) -> None:
    theirs = used_by(lambda o: hf.get_cosine_schedule_with_warmup(o, warmup, STEPS, cycles))
    assert ours(Cosine(warmup=warmup, cycles=cycles, min_ratio=0.0)) == close(theirs)


@pytest.mark.parametrize("cycles", [0.5, 1.25])
@pytest.mark.parametrize("warmup", WARMUPS)
def test_cosine_with_a_floor_is_hugging_faces(hf: Any, warmup: int, cycles: float) -> None:
    theirs = used_by(
        lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, warmup, STEPS, cycles, min_lr_rate=0.1)
    )
    if warmup:  # under warm-up it is the same rise from 0: checked, so that a change there is seen
        assert theirs[0] == 0.0
    assert ours(Cosine(warmup=warmup, cycles=cycles, min_ratio=0.1)) == close(theirs)


@pytest.mark.parametrize("warmup", WARMUPS)
def test_wsd_is_hugging_faces(hf: Any, warmup: int) -> None:
    theirs = used_by(lambda o: hf.get_wsd_schedule(o, warmup, num_decay_steps=15, num_stable_steps=20))
    assert ours(WSD(name="wsd", warmup=warmup, stable=20, decay=15)) == close(theirs)


def test_wsd_with_a_floor_is_hugging_faces_after_the_warm_up_which_starts_at_0_here(hf: Any) -> None:
    theirs = used_by(
        lambda o: hf.get_wsd_schedule(o, 10, num_decay_steps=15, num_stable_steps=20, min_lr_ratio=0.1)
    )
    rates = ours(WSD(name="wsd", warmup=10, stable=20, decay=15, min_ratio=0.1))
    assert rates[10:] == close(theirs[10:])
    assert rates[0] == 0.0
    assert theirs[0] == pytest.approx(0.1 * PEAK)


# --- DeepSpeed -----------------------------------------------------------------------------------


def warmup_decay_of_deepspeed(warmup: int, kind: str) -> list[float]:
    schedules = pytest.importorskip(
        "deepspeed.runtime.lr_schedules", reason="needs deepspeed (always there on Linux)"
    )
    return used_by(
        lambda o: schedules.WarmupDecayLR(
            o, STEPS, warmup_max_lr=PEAK, warmup_num_steps=warmup, warmup_type=kind
        )
    )


@pytest.mark.parametrize("kind", ["linear", "log"])
@pytest.mark.parametrize("warmup", [2, 10, 59])
def test_warmup_decay_is_deepspeeds_one_update_earlier(warmup: int, kind: Any) -> None:
    theirs = warmup_decay_of_deepspeed(warmup, kind)
    rates = ours(WarmupDecay(name="warmup-decay", warmup=warmup, warmup_type=kind))
    assert theirs[1:] == close(rates[:-1])
    assert theirs[0] == 0.0  # before its first step() it is at its minimum
    assert theirs != close(rates)


def test_deepspeed_takes_a_warm_up_of_1_for_2_and_refuses_0() -> None:
    assert warmup_decay_of_deepspeed(1, "linear") == warmup_decay_of_deepspeed(2, "linear")
    with pytest.raises(ValueError, match="must be a positive integer"):
        warmup_decay_of_deepspeed(0, "linear")


# --- the plots -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLOTS)
def test_the_committed_plot_is_what_the_program_draws(name: str) -> None:
    committed = (DOCS / "plots" / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == draw(name), "run: python -m docs.plot_schedules"


def test_every_schedule_has_a_plot_and_the_page_shows_it() -> None:
    assert set(PLOTS) == {schedule.name for schedule in ALL}
    page = (DOCS / "schedules.md").read_text(encoding="utf-8")
    assert all(f"plots/{name}.svg" in page for name in PLOTS)
