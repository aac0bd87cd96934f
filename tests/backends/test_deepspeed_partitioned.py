"""Stage 3 on two processes: no rank ever holds the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from tests.backends.partitioned_worker import GATHER_LITTLE, LOADED, VOCABULARY, make_spec
from tests.jobs import ON_THE_CPU, run_job
from tests.models.families import write_config
from xtrain import registry
from xtrain.models.hf import READ_WHOLE
from xtrain.models.presets import dimensions
from xtrain.models.source import model_source

USABLE = registry.survey()["deepspeed"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not USABLE.usable, reason=USABLE.reason)]

FP32_BYTES = 4
LARGEST_BYTES = 4 * dimensions(make_spec()).hidden ** 2 * FP32_BYTES
"""A matrix of the feed-forward part: the largest parameter of this model."""
LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}


def write_models(folder: Path) -> None:
    """A Llama's config, the same with weights, also under names the library alone knows, and a preset's."""
    for name in ("llama", "stored", "renamed"):
        write_config(folder / name, "llama", **LLAMA)
    llama_source = model_source(make_spec(model={"hf": str(folder / "llama")}), VOCABULARY)
    named = llama_source.build().named_parameters()
    weights = {name.removeprefix("model."): weight.detach() + 1 for name, weight in named}
    save_file(weights, folder / "stored" / "model.safetensors")
    renamed = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(renamed, folder / "renamed" / "model.safetensors")
    (folder / "preset").mkdir()
    (folder / "preset" / "config.json").write_text('{"model_type": "gpt2"}')
    preset = model_source(make_spec(), VOCABULARY).build()
    stored = {name: weight.detach() + 1 for name, weight in preset.named_parameters()}
    save_file(stored, folder / "preset" / "model.safetensors")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("partitioned")
    write_models(folder)
    out = folder / "out.json"
    run_job(2, "tests.backends.partitioned_worker", out, folder, **ON_THE_CPU)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_from_the_second_step_on_no_more_is_gathered_than_the_ds_config_allows(
    report: dict[str, Any],
) -> None:
    trained = report["trained"]
    assert max(trained["gathered"][1:]) <= trained["allowed"] < 0.5 * trained["parameters"]


def test_the_bounds_of_a_model_of_the_library_are_taken_from_the_built_one(report: dict[str, Any]) -> None:
    trained = report["hf trained"]
    assert max(trained["gathered"][1:]) <= trained["allowed"] < 0.8 * trained["parameters"]
    assert trained["notes"] == []


def test_the_ds_config_that_is_written_has_the_sizes_that_are_used(report: dict[str, Any]) -> None:
    h, between = LLAMA["hidden_size"], LLAMA["intermediate_size"]
    block = 3 * h * h + 3 * h * between + 2 * h  # half as many heads for keys and values
    for kind in ("hf trained", "factory trained"):
        assert report[kind]["written"] == report[kind]["ds_config"]
        assert report[kind]["written"]["reduce_bucket_size"] == report[kind]["bucket"]
    assert report["hf trained"]["written"]["stage3_prefetch_bucket_size"] == block
    assert report["hf trained"]["written"]["stage3_param_persistence_threshold"] == h


def test_an_override_wins_over_the_built_model_s_sizes(report: dict[str, Any]) -> None:
    expected = GATHER_LITTLE["zero_optimization"]["stage3_max_live_parameters"]
    assert report["factory trained"]["allowed"] == expected


def test_a_host_s_second_pieces_are_those_of_the_state_that_was_loaded(report: dict[str, Any]) -> None:
    seen = report["computes with"]
    assert len(seen) > 20
    assert all(pair == pytest.approx([LOADED, LOADED]) for pair in seen.values()), seen


def test_without_the_bound_everything_is_gathered_and_the_count_sees_it(report: dict[str, Any]) -> None:
    assert max(report["unbounded"]["gathered"][1:]) == report["unbounded"]["parameters"]


def test_weights_do_not_stay_for_the_backward_pass(report: dict[str, Any]) -> None:
    """Autograd saves views of them; a view would hold the memory that DeepSpeed gave up."""
    trained = report["trained"]
    assert trained["held_bytes"] <= trained["allowed"] * FP32_BYTES


CUT_UP = ("preset", "preset from a folder", "factory", "hf", "hf with weights", "hf from a folder")
BUILT_WHOLE = {
    "learning": "its code computes gradients while it builds the model",
    "unequal": "its code does not do the same on every process",
}


@pytest.mark.parametrize("kind", CUT_UP)
def test_while_it_is_built_a_rank_holds_its_pieces_and_one_parameter(
    kind: str, report: dict[str, Any]
) -> None:
    built = report["constructed"][kind]
    assert built["kept"] == pytest.approx(built["whole"] / 2, rel=1e-3)
    assert built["peak"] <= built["kept"] + 2.5 * built["largest"] < 0.75 * built["whole"]
    assert built["notes"] == []


@pytest.mark.parametrize("kind", [*CUT_UP, *BUILT_WHOLE, "hf under other names"])
def test_what_is_cut_up_has_the_numbers_of_what_is_built_whole(kind: str, report: dict[str, Any]) -> None:
    assert report["constructed"][kind]["wrong"] == []


@pytest.mark.parametrize(("kind", "reason"), BUILT_WHOLE.items())
def test_code_that_cannot_be_cut_up_builds_the_model_whole_and_says_why(
    kind: str, reason: str, report: dict[str, Any]
) -> None:
    built = report["constructed"][kind]
    assert built["notes"] == [f"each process builds the whole model before it is cut up: {reason}"]
    assert built["peak"] >= built["whole"]  # as the count must see it


def test_weights_that_only_the_library_can_read_are_read_whole_and_said_so(
    report: dict[str, Any],
) -> None:
    assert report["constructed"]["hf under other names"]["notes"] == [READ_WHOLE]


def test_while_it_is_loaded_a_rank_holds_no_more_than_one_parameter_more(report: dict[str, Any]) -> None:
    held = sum(report["trained"]["categories"].values())
    assert report["trained"]["import_peak"] <= held + 3 * LARGEST_BYTES


def test_memory_by_category_is_that_of_this_ranks_share(report: dict[str, Any]) -> None:
    categories, share = report["trained"]["categories"], report["trained"]["parameters"] * FP32_BYTES / 2
    assert categories["optimizer"] == pytest.approx(2 * share, rel=0.01)
    assert categories["gradients"] == pytest.approx(share, rel=0.01)
    assert categories["master"] == pytest.approx(share, rel=0.01)  # DeepSpeed keeps one in fp32 too
    assert share <= categories["parameters"] <= 1.2 * share  # biases and norms stay gathered
