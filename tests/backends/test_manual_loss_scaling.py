"""The scaler's rules are DeepSpeed's: held against DeepSpeed's own class, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.manual.loss_scaling import LossScaler
from xtrain.spec.tree import Precision


def precision(**values: Any) -> Precision:
    return Precision.model_validate({"dtype": "fp16", **values})


@pytest.fixture(scope="module")
def deepspeed_scaler() -> Iterator[Any]:
    pytest.importorskip("deepspeed", reason="needs deepspeed (Linux)")
    from deepspeed.runtime.fp16 import loss_scaler

    with pytest.MonkeyPatch.context() as patch:
        # It asks for its rank before it logs; there is no process group here.
        patch.setattr(loss_scaler.dist, "get_rank", lambda: 1)
        yield loss_scaler.DynamicLossScaler


@settings(max_examples=300, deadline=None)
@given(
    overflows=st.lists(st.booleans(), max_size=60),
    power=st.integers(0, 20),
    window=st.integers(1, 4),
    hysteresis=st.integers(1, 3),
    floor=st.sampled_from([0.25, 1.0, 3.0, 16.0]),
)
def test_the_scale_follows_deepspeeds_path(
    deepspeed_scaler: Any, overflows: list[bool], power: int, window: int, hysteresis: int, floor: float
) -> None:
    ours = LossScaler(
        precision(
            initial_scale_power=power,
            loss_scale_window=window,
            hysteresis=hysteresis,
            min_loss_scale=floor,
        )
    )
    theirs = deepspeed_scaler(
        init_scale=2.0**power,
        scale_window=window,
        min_scale=floor,
        delayed_shift=hysteresis,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )
    for overflow in overflows:
        ours.update(overflow)
        theirs.update_scale(overflow)
        assert (ours.scale, ours.hysteresis) == (theirs.cur_scale, theirs.cur_hysteresis)


@given(overflows=st.lists(st.booleans(), max_size=30), cut=st.integers(0, 30))
def test_a_restored_scaler_goes_on_as_the_one_it_comes_from(overflows: list[bool], cut: int) -> None:
    section = precision(initial_scale_power=8, loss_scale_window=2, hysteresis=2)
    whole, before, after = LossScaler(section), LossScaler(section), LossScaler(section)
    for overflow in overflows:
        whole.update(overflow)
    for overflow in overflows[:cut]:
        before.update(overflow)
    after.restore(json.loads(json.dumps(before.state())))
    for overflow in overflows[cut:]:
        after.update(overflow)
    assert after.state() == whole.state()


@given(overflows=st.lists(st.booleans(), max_size=30))
def test_a_static_scale_never_moves(overflows: list[bool]) -> None:
    scaler = LossScaler(precision(loss_scale=128.0))
    for overflow in overflows:
        scaler.update(overflow)
    assert scaler.scale == 128.0


def test_hysteresis_is_used_up_before_the_scale_halves_and_refilled_when_it_doubles() -> None:
    scaler = LossScaler(precision(initial_scale_power=4, loss_scale_window=2, hysteresis=2))
    path = []
    for overflow in (True, True, False, False, False, False, True, True):
        scaler.update(overflow)
        path.append(scaler.scale)
    assert path == [16, 8, 8, 8, 16, 16, 16, 8]
