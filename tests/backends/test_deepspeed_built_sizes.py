"""What stage 3's bounds follow from, where the model has to be built first."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from backends.deepspeed.built_sizes import bounded, bounds_of, built_pieces, completed
from backends.deepspeed.zero import PERSISTENT, pieces_of
from tests.backends.built_models import WIDTH, thorough
from tests.backends.partitioned_worker import VOCABULARY, make_spec
from xtrain.contract import Resolved
from xtrain.errors import RequestError
from xtrain.models.source import model_source


def test_a_built_preset_has_the_pieces_that_its_sizes_foretell() -> None:
    spec = make_spec()
    assert built_pieces(model_source(spec, VOCABULARY).build(), None) == pieces_of(spec)


def test_a_factory_s_bounds_hold_two_of_its_layers_and_two_of_its_largest() -> None:
    spec, layer = make_spec(model={"factory": "any:any"}), thorough().get_submodule("layers.0")
    bounds: Any = bounds_of(spec, thorough())
    block = sum(parameter.numel() for parameter in layer.parameters())
    assert bounds["stage3_prefetch_bucket_size"] == bounds["stage3_max_reuse_distance"] == block
    assert bounds["stage3_param_persistence_threshold"] == 3 * WIDTH  # attention's bias
    assert 2 * block < bounds["stage3_max_live_parameters"] < 3 * block


def test_a_long_vector_does_not_make_every_parameter_stay() -> None:
    model = nn.Sequential(nn.LayerNorm(PERSISTENT + 1, device="meta"))
    pieces = built_pieces(nn.ModuleDict({"layers": model}), None)
    assert pieces is not None
    assert (pieces.vector, pieces.vectors) == (PERSISTENT, 0)


def test_without_a_list_of_blocks_nothing_is_bounded() -> None:
    assert bounds_of(make_spec(model={"factory": "any:any"}), nn.Linear(2, 2)) is None


def test_a_wrong_name_of_the_list_is_refused() -> None:
    with pytest.raises(RequestError, match=r"model\.blocks: found blocks"):
        built_pieces(thorough(), "blocks")


def test_below_stage_3_and_for_presets_nothing_is_added() -> None:
    assert bounds_of(make_spec(), nn.Linear(2, 2)) == {}


def test_what_the_ds_config_says_already_stays() -> None:
    config = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7}, "steps_per_print": 1}
    bounds: Any = {"stage3_max_live_parameters": 8, "stage3_max_reuse_distance": 9}
    block = {"stage": 3, "stage3_max_live_parameters": 7, "stage3_max_reuse_distance": 9}
    assert bounded(config, bounds) == {"zero_optimization": block, "steps_per_print": 1}
    given: Any = {"ds_config": config, "zero_stage": 3}
    resolved = completed(Resolved("deepspeed", make_spec(), 2, given), bounds)
    assert resolved.settings["ds_config"] == resolved.files["ds_config.json"] == bounded(config, bounds)
    assert resolved.settings["zero_stage"] == 3
