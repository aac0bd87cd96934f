"""What the plan says that a process sends, against what it hands to collectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.backends.sent_worker import make_spec
from tests.jobs import ON_THE_CPU, run_job
from xtrain import registry
from xtrain.models.presets import BYTES_VOCABULARY, fitted_dimensions
from xtrain.plan.layout import HOST
from xtrain.plan.step import preset_step

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


def planned(changes: dict[str, Any]) -> int:
    spec, backend = make_spec(changes), registry.load("deepspeed")
    layout = backend.layout(spec, WORLD, HOST)  # type: ignore[attr-defined]
    step = preset_step(spec, spec.accumulation(WORLD), fitted_dimensions(spec, BYTES_VOCABULARY))
    return int(layout.sent_bytes(step))


@pytest.mark.slow
@pytest.mark.skipif(not USABLE.usable, reason=USABLE.reason)
def test_what_each_stage_sends_is_planned(tmp_path: Path) -> None:
    cases, out = tmp_path / "cases.json", tmp_path / "out.json"
    cases.write_text(json.dumps([changes for changes, _ in CASES]))
    run_job(WORLD, "tests.backends.sent_worker", cases, out, **ON_THE_CPU)
    for (changes, tolerance), found in zip(CASES, json.loads(out.read_text()), strict=True):
        assert planned(changes) == pytest.approx(sum(found.values()), rel=tolerance), (changes, found)
