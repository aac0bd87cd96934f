"""What buckets and stage 3's bounds follow from, where the model has to be built first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from backends.deepspeed.built_sizes import built_pieces, built_sizes, completed, sized
from backends.deepspeed.zero import PERSISTENT, SMALLEST_BUCKET, pieces_of
from tests.backends.built_models import WIDTH, square, thorough
from tests.backends.partitioned_worker import VOCABULARY, make_spec
from xtrain.contract import Resolved
from xtrain.errors import RequestError
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec

NVME = {"device": "nvme", "path": "/tmp"}


def test_a_built_preset_has_the_pieces_that_its_sizes_foretell() -> None:
    spec = make_spec()
    assert built_pieces(model_source(spec, VOCABULARY).build(), None) == pieces_of(spec)


WORLD = 2
BUCKETS = {"reduce_bucket_size", "allgather_bucket_size"}


def built(sharding: str, offload: dict[str, Any] | None = None, model: nn.Module | None = None) -> Any:
    """The sizes that are found for a factory's model."""
    spec = make_spec(model={"factory": "any:any"})
    memory = {"sharding": sharding, "offload": offload or {}}
    spec = Spec.model_validate({**spec.model_dump(mode="json", by_alias=True), "memory": memory})
    return built_sizes(spec, model or thorough(), WORLD)


def test_a_factory_s_bounds_hold_two_of_its_layers_and_two_of_its_largest() -> None:
    sizes, layer = built("parameters"), thorough().get_submodule("layers.0")
    block = sum(parameter.numel() for parameter in layer.parameters())
    assert sizes["stage3_prefetch_bucket_size"] == sizes["stage3_max_reuse_distance"] == block
    assert sizes["stage3_param_persistence_threshold"] == 3 * WIDTH  # attention's bias
    assert 2 * block < sizes["stage3_max_live_parameters"] < 3 * block


@pytest.mark.parametrize("sharding", ["optimizer", "gradients", "parameters"])
def test_a_factory_s_buckets_hold_one_of_its_layers_and_are_even(sharding: str) -> None:
    with torch.device("meta"):
        model = square()
    sizes, block = built(sharding, model=model), model.get_parameter("layers.0.weight").numel()
    assert block % 2
    assert {sizes[key] for key in BUCKETS} == {block + 1}
    assert (sizes.keys() == BUCKETS) == (sharding != "parameters")


def test_a_small_factory_s_buckets_are_no_smaller_than_a_preset_s() -> None:
    assert built("gradients") == dict.fromkeys(BUCKETS, SMALLEST_BUCKET)


def test_a_factory_s_optimizer_is_swapped_by_shares_of_its_largest_part() -> None:
    with torch.device("meta"):
        model = square()
    largest = model.get_parameter("table.weight").numel()
    assert built("parameters", {"optimizer": NVME}, model)["sub_group_size"] == -(-largest // WORLD)


def test_a_long_vector_does_not_make_every_parameter_stay() -> None:
    model = nn.Sequential(nn.LayerNorm(PERSISTENT + 1, device="meta"))
    pieces = built_pieces(nn.ModuleDict({"layers": model}), None)
    assert pieces is not None
    assert (pieces.vector, pieces.vectors) == (PERSISTENT, 0)


def test_without_a_list_of_blocks_nothing_is_sized() -> None:
    assert built("parameters", model=nn.Linear(2, 2)) is None
    assert built("gradients", model=nn.Linear(2, 2)) is None


def test_a_wrong_name_of_the_list_is_refused() -> None:
    with pytest.raises(RequestError, match=r"model\.blocks: found blocks"):
        built_pieces(thorough(), "blocks")


def test_at_stage_0_and_for_presets_nothing_is_added() -> None:
    assert built("none", model=nn.Linear(2, 2)) == {}
    assert built_sizes(make_spec(), nn.Linear(2, 2), WORLD) == {}


def test_what_the_ds_config_says_already_stays() -> None:
    config = {"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 7}, "steps_per_print": 1}
    found: Any = {"stage3_max_live_parameters": 8, "stage3_max_reuse_distance": 9}
    block = {"stage": 3, "stage3_max_live_parameters": 7, "stage3_max_reuse_distance": 9}
    assert sized(config, found) == {"zero_optimization": block, "steps_per_print": 1}
    given: Any = {"ds_config": config, "zero_stage": 3}
    resolved = completed(Resolved("deepspeed", make_spec(), 2, given), found)
    assert resolved.settings["ds_config"] == resolved.files["ds_config.json"] == sized(config, found)
    assert resolved.settings["zero_stage"] == 3
