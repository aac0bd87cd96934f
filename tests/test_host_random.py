"""Python's and NumPy's random states: kept as JSON, brought back to the last draw, and in whole runs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.drawing_model import FACTORY
from tests.small_runs import SPEC, metrics, run, weights
from tests.test_resume import forge_extras
from xtrain.checkpoints.format import complete_checkpoints
from xtrain.host_random import host_random_state, restore_host_random, seed_host

DRAWING = SPEC.replace("{preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}", f"{{factory: {FACTORY}}}")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = host_random_state()
    yield
    restore_host_random(before)


def draws() -> list[float]:
    return [random.gauss(0, 1), random.random(), np.random.standard_normal(), np.random.random()]


@pytest.mark.parametrize("drawn", [0, 1, 2, 700])
def test_draws_go_on_where_they_were(drawn: int) -> None:
    """After an odd number of normal draws, the second of a pair is kept for the next."""
    seed_host(3)
    for _ in range(drawn):
        random.gauss(0, 1)
        np.random.standard_normal()
    stored = json.loads(json.dumps(host_random_state(), allow_nan=False))
    expected = draws()
    seed_host(4)
    restore_host_random(stored)
    assert draws() == expected


def test_a_seed_of_any_size_sets_both() -> None:
    found = []
    for seed in (7, 7, 7 + (1 << 40), (1 << 63) - 1):
        seed_host(seed)
        found.append(draws())
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2]) & set(found[3])
    assert found[1][2] != found[2][2] != found[3][2]


def test_a_generator_of_another_kind_is_left_out_and_left_alone() -> None:
    before = np.random.get_bit_generator()  # type: ignore[attr-defined]
    np.random.set_bit_generator(np.random.PCG64(1))  # type: ignore[attr-defined]
    try:
        state = host_random_state()
    finally:
        np.random.set_bit_generator(before)  # type: ignore[attr-defined]
    assert sorted(state) == ["python"]
    np.random.seed(5)
    expected = np.random.RandomState(5).random()
    restore_host_random(state)
    assert np.random.random() == expected


def changed(generator: str, key: str, value: Any) -> dict[str, Any]:
    state: Any = host_random_state()
    return {**state, generator: {**state[generator], key: value}}


@pytest.mark.parametrize(
    ("generator", "key", "value"),
    [
        ("python", "words", "AAAA"),
        ("python", "words", "!"),
        ("python", "words", None),
        ("python", "words", "/" * 3334),
        ("python", "gauss", "1"),
        ("python", "gauss", float("inf")),
        ("numpy", "words", "AAAA" * 1000),
        ("numpy", "position", -1),
        ("numpy", "position", 625),
        ("numpy", "position", True),
        ("numpy", "gauss", [1.0]),
    ],
)
def test_a_state_that_is_none_is_refused(generator: str, key: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        restore_host_random(changed(generator, key, value))


def test_a_state_that_lacks_a_part_is_refused() -> None:
    for generator in ("python", "numpy"):
        with pytest.raises((KeyError, TypeError)):
            restore_host_random({generator: {"gauss": None}})


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that ended, and the same stopped after 5 of its 12 updates."""
    folder = tmp_path_factory.mktemp("drawing")
    for out, words in (("whole", ()), ("stopped", ("--stop-after", 5))):
        done = run(folder, "--out", folder / out, *words, spec=DRAWING, backend="cpu", batch__micro=4)
        assert done.exit_code == 0, done.output
    return folder


def gone_on(folder: Path, out: Path, without: str = "") -> bytes:
    """The weights at the end of the stopped run, one of its extras taken away."""
    forge_extras(
        folder / "stopped" / "checkpoints" / "step-00000005",
        lambda extras: {key: value for key, value in extras.items() if key != without},
    )
    words = ("--resume", folder / "stopped", "--out", out)
    done = run(folder, *words, spec=DRAWING, backend="cpu", batch__micro=4)
    assert done.exit_code == 0, done.output
    assert len(metrics(out)) == 12
    return weights(out, 12)


def test_a_model_that_draws_from_python_and_numpy_ends_with_the_same_bytes(
    drawing: Path, tmp_path: Path
) -> None:
    assert gone_on(drawing, tmp_path / "out") == weights(drawing / "whole", 12)


def test_updates_are_counted_for_each_parameter(drawing: Path) -> None:
    (*_, stopped) = complete_checkpoints(drawing / "stopped" / "checkpoints")
    (extras,) = stopped.state().extras
    counts: Any = extras["optimizer_steps_of"]
    assert extras["optimizer_steps"] == 5
    assert sorted(counts) == ["model.sometimes.bias", "model.sometimes.weight"]
    assert 0 < counts["model.sometimes.bias"] < 5


@pytest.mark.parametrize("without", ["host_random", "optimizer_steps_of"])
def test_a_checkpoint_from_before_it_was_kept_goes_on_inexactly(
    drawing: Path, tmp_path: Path, without: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(drawing, copy)
    assert gone_on(copy, tmp_path / "out", without) != weights(drawing / "whole", 12)


def test_states_that_are_none_are_named_and_nothing_is_lost(drawing: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(drawing, copy)
    folder = copy / "stopped" / "checkpoints" / "step-00000005"
    forge_extras(folder, lambda extras: {**extras, "host_random": {"python": {"words": 3, "gauss": None}}})
    done = run(copy, "--resume", copy / "stopped", spec=DRAWING, backend="cpu", batch__micro=4)
    assert done.exit_code == 2
    assert f"{folder}/state.json is damaged: extras or guards: TypeError" in done.stderr
