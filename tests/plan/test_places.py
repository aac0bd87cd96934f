"""Predicted and measured on an accelerator of its own: offload, and layers over devices."""

from __future__ import annotations

import pytest

from benchmarks.plan_accuracy import outcomes
from benchmarks.plan_cases import BF16_WEIGHTS, HALVES, SIMULATED, STATE, Case
from benchmarks.plan_measure import measure
from xtrain.contract import MEMORY_CATEGORIES

WAYS = [
    Case(SIMULATED, offload={"optimizer": "cpu"}),
    Case(SIMULATED, offload=STATE, precision=BF16_WEIGHTS),
    Case(SIMULATED, offload={"activations": "cpu"}, layers=6),
    Case(SIMULATED, offload={**STATE, "activations": "cpu"}, precision="bf16"),
    Case(SIMULATED, manual=HALVES, layers=6),
    Case(SIMULATED, manual=HALVES, layers=6, offload=STATE, checkpointing="auto"),
    Case(SIMULATED, accumulation=1, offload={"optimizer": "cpu"}, checkpointing="auto", in_backward=True),
]
WORST, TOTAL_ERROR = 0.12, 0.025
"""Of a category that is more than a negligible part, and of all that a place holds."""


@pytest.mark.parametrize("case", WAYS, ids=str)
def test_each_place_is_predicted(case: Case) -> None:
    found = list(outcomes(case, measure(case)))
    assert {one.place for one in found} == {"sim:0", "cpu"}
    for one in found:
        assert abs(one.error) <= TOTAL_ERROR, (one.place, one.predicted, one.measured)
        wrong = [name for name in MEMORY_CATEGORIES if one.holds(name) and one.category_error(name) > WORST]
        assert not wrong, (one.place, one.predicted, one.measured)
