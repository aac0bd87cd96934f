"""What the plan says that a process sends, against what it hands to collectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from backends.deepspeed.built_sizes import built_sizes, sized
from backends.deepspeed.zero import BLOCK
from benchmarks.plan_cases import LLAMA
from tests.backends.built_models import square
from tests.backends.sent_worker import make_spec
from tests.jobs import ON_THE_CPU, run_job
from xtrain import registry
from xtrain.plan.layout import HOST
from xtrain.plan.models import planned_model
from xtrain.plan.step import Step
from xtrain.spec.tree import Spec

USABLE = registry.survey()["deepspeed"]
WORLD = 2
EXACT, ABOUT = 0.001, 0.06
"""Relative: rounding of buckets; what is prefetched over the turn at stage 3."""
ONCE, TWICE = {"global": 4, "micro": 2}, {"global": 4, "micro": 1}
CASES: list[tuple[dict[str, Any], float]] = [
    ({"batch": TWICE}, EXACT),
    ({"memory": {"sharding": "optimizer"}, "batch": TWICE}, EXACT),
    ({"memory": {"sharding": "gradients"}, "batch": ONCE}, EXACT),
    ({"memory": {"sharding": "gradients"}, "batch": TWICE}, EXACT),
    ({"memory": {"sharding": "parameters"}, "batch": ONCE}, ABOUT),
    ({"memory": {"sharding": "parameters"}, "batch": TWICE}, ABOUT),
    ({"memory": {"sharding": "parameters", "checkpointing": "auto"}, "batch": ONCE}, ABOUT),
]


def layout_of(spec: Spec) -> Any:
    backend: Any = registry.load("deepspeed")
    return backend.layout(spec, WORLD, HOST)


def step_of(spec: Spec) -> Step:
    return Step(spec, planned_model(spec, HOST).bytes(spec), spec.accumulation(WORLD))


def planned(changes: dict[str, Any]) -> int:
    spec = make_spec(changes)
    return int(layout_of(spec).sent_bytes(step_of(spec)))


BUCKET = "reduce_bucket_size"
BUILT = "tests.backends.built_models:square"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": {"preset": "gpt2-medium"}},
        {"deepspeed": {"zero_optimization": {BUCKET: 12_345}}},
        {"deepspeed": {"zero_optimization": {BUCKET: 2e8}}},
        {"model": {"factory": BUILT}},
        {"model": {"factory": BUILT}, "deepspeed": {"zero_optimization": {BUCKET: 12_345}}},
    ],
)
def test_the_planned_bucket_is_the_run_s(changes: dict[str, Any]) -> None:
    spec = make_spec({"memory": {"sharding": "gradients"}, **changes})
    settings: Any = registry.load("deepspeed").resolve(spec, WORLD).settings
    with torch.device("meta"):
        found = built_sizes(spec, square(), WORLD) or {}  # the preset's are known
    assert layout_of(spec).bucket(step_of(spec)) == sized(settings["ds_config"], found)[BLOCK][BUCKET]


def test_one_process_gathers_nothing() -> None:
    spec, backend = make_spec({"memory": {"sharding": "parameters"}}), registry.load("deepspeed")
    step = Step(spec, planned_model(spec, HOST).bytes(spec), spec.accumulation(1))
    layout: Any = backend.layout(spec, 1, HOST)  # type: ignore[attr-defined]
    weights = step.model.parameters * step.widths.weight
    assert {layout.held(step, moment)[HOST]["parameters"] for moment in step.moments()} == {weights}
    assert layout.sent_bytes(step) == 0


@pytest.mark.slow
@pytest.mark.skipif(not USABLE.usable, reason=USABLE.reason)
def test_what_each_stage_sends_is_planned(tmp_path: Path) -> None:
    cases, out = tmp_path / "cases.json", tmp_path / "out.json"
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    library: dict[str, Any] = {"model": {"hf": str(tmp_path)}, "memory": {"sharding": "parameters"}}
    all_cases = [*CASES, ({**library, "batch": TWICE}, ABOUT)]
    cases.write_text(json.dumps([changes for changes, _ in all_cases]))
    run_job(WORLD, "tests.backends.sent_worker", cases, out, **ON_THE_CPU)
    for (changes, tolerance), found in zip(all_cases, json.loads(out.read_text()), strict=True):
        assert planned(changes) == pytest.approx(sum(found.values()), rel=tolerance), (changes, found)
