"""The sizes of the built-in models, without building one."""

from __future__ import annotations

import pytest

from xtrain.models.presets import PRESETS, Dimensions, dimensions, parameter_count
from xtrain.spec.tree import PRESETS as PRESET_NAMES
from xtrain.spec.tree import Spec


def spec(**model: object) -> Spec:
    return Spec.model_validate(
        {
            "model": model,
            "data": {"source": "stdlib"},
            "batch": {"global": 4},
            "train": {"steps": 1},
            "optimizer": {"lr": 0.001},
        }
    )


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_preset_has_the_published_number_of_parameters(name: str, published: int) -> None:
    assert parameter_count(PRESETS[name]) == published


def test_every_preset_a_spec_may_name_has_dimensions() -> None:
    assert tuple(PRESETS) == PRESET_NAMES


def test_overrides_replace_the_preset_and_leave_the_rest() -> None:
    assert dimensions(spec(preset="gpt2", layers=2, hidden=48, heads=3)) == Dimensions(2, 48, 3, 1024, 50257)
    assert dimensions(spec(preset="gpt2", vocab_size=300, positions=64)).vocab_size == 300
    assert dimensions(spec(preset="gpt2-nano")) == PRESETS["gpt2-nano"]


def test_model_that_is_no_preset_has_no_known_dimensions() -> None:
    with pytest.raises(KeyError):
        dimensions(spec(factory="package.module:build"))
