"""Stage 3 on two processes: no rank ever holds the whole model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.backends.partitioned_worker import make_spec
from tests.jobs import ON_THE_CPU, run_job
from xtrain import registry
from xtrain.models.presets import dimensions

USABLE = registry.survey()["deepspeed"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not USABLE.usable, reason=USABLE.reason)]

FP32_BYTES = 4
LARGEST_BYTES = 4 * dimensions(make_spec()).hidden ** 2 * FP32_BYTES
"""A matrix of the feed-forward part: the largest parameter of this model."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("partitioned") / "out.json"
    run_job(2, "tests.backends.partitioned_worker", out, **ON_THE_CPU)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_from_the_second_step_on_no_more_is_gathered_than_the_ds_config_allows(
    report: dict[str, Any],
) -> None:
    trained = report["trained"]
    assert max(trained["gathered"][1:]) <= trained["allowed"] < 0.5 * trained["parameters"]


def test_without_the_bound_everything_is_gathered_and_the_count_sees_it(report: dict[str, Any]) -> None:
    assert max(report["unbounded"]["gathered"][1:]) == report["unbounded"]["parameters"]


def test_weights_do_not_stay_for_the_backward_pass(report: dict[str, Any]) -> None:
    """Autograd saves views of them; a view would hold the memory that DeepSpeed gave up."""
    trained = report["trained"]
    assert trained["held_bytes"] <= trained["allowed"] * FP32_BYTES


def test_while_it_is_built_a_rank_holds_its_pieces_and_one_parameter(report: dict[str, Any]) -> None:
    built, whole = report["constructed"], report["trained"]["parameters"] * FP32_BYTES
    assert built["kept"] == pytest.approx(whole / 2, rel=1e-3)
    assert built["peak"] <= built["kept"] + 2 * LARGEST_BYTES


def test_while_it_is_loaded_a_rank_holds_no_more_than_one_parameter_more(report: dict[str, Any]) -> None:
    held = sum(report["trained"]["categories"].values())
    assert report["trained"]["import_peak"] <= held + 3 * LARGEST_BYTES


def test_memory_by_category_is_that_of_this_ranks_share(report: dict[str, Any]) -> None:
    categories, share = report["trained"]["categories"], report["trained"]["parameters"] * FP32_BYTES / 2
    assert categories["optimizer"] == pytest.approx(2 * share, rel=0.01)
    assert categories["gradients"] == pytest.approx(share, rel=0.01)
    assert categories["master"] == pytest.approx(share, rel=0.01)  # DeepSpeed keeps one in fp32 too
    assert share <= categories["parameters"] <= 1.2 * share  # biases and norms stay gathered
