"""What must not grow does not, in counts; the seconds beside them are `python -m benchmarks.growth`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.growth import FAR_STEP, Unseen, batch_calls, counted_calls, make_spec, start, turn_calls
from xtrain.data import open_data
from xtrain.loop import Loop
from xtrain.schedule import learning_rate

ROUNDING = 0.02
"""A place outside the table of the data's order is drawn again: now and then, anywhere."""


def calls(folder: Path, size_bytes: int, step: int) -> float:
    path = folder / f"{size_bytes}.bin"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    data = open_data(make_spec(source="tokens", path=str(path)), show_progress=False)
    return batch_calls(data, step, 50)


@pytest.mark.slow
def test_a_batch_costs_the_same_whatever_the_size_of_the_data_and_a_million_steps_later(
    tmp_path: Path,
) -> None:
    """Both are too large to be checked as a whole, so that ids are checked as they are used."""
    small, large = 2 * 10**9, 10**10
    near = calls(tmp_path, small, 0)
    for size_bytes, step in ((large, 0), (small, FAR_STEP), (large, FAR_STEP)):
        assert calls(tmp_path, size_bytes, step) == pytest.approx(near, rel=ROUNDING)


@pytest.mark.slow  # the first update imports much of torch
def test_a_turn_of_the_loop_costs_the_same_a_million_steps_later() -> None:
    spec = make_spec()
    engine, data = start(spec)
    loop = Loop(engine, data, learning_rate(spec), Unseen(), 10, audits=False)
    near, far = (turn_calls(loop, first, 20) for first in (0, FAR_STEP))
    engine.close()
    assert far == pytest.approx(near, rel=ROUNDING)


def test_calls_are_counted() -> None:
    with counted_calls() as few:
        len("")
    with counted_calls() as more:
        for _ in range(10):
            len("")
    assert more[0] - few[0] == 9
