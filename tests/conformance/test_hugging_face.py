"""Models of the transformers library train here as in a plain loop with the library's own loss."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.cases import SGD_UNCLIPPED, Lane, Training
from tests.conformance.conftest import RunCases
from tests.conformance.plain import Curve, train
from tests.models.families import FAMILIES, write_config
from xtrain.spec.tree import Spec

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Relative; measured: losses 2.6e-7, norms 5.7e-7 at most, over all families and lanes."""
REFERENCE = Lane("cpu")
ALONE = [Lane("deepspeed"), Lane("deepspeed", "parameters")]
TOGETHER = [Lane("deepspeed", world=2), Lane("deepspeed", "parameters", world=2)]
ON_TWO = ("llama", "gemma2")
"""Families that are trained on two processes too: one with a head of its own, one tied and capped."""
TRAINED = [
    *((family, REFERENCE, optimizer) for family in FAMILIES for optimizer in ("adamw", "sgd")),
    *((family, lane, "sgd") for family in FAMILIES for lane in ALONE),  # blind to no factor on the gradients
    *((family, lane, "adamw") for family in ON_TWO for lane in TOGETHER),
]


def training(family: str, folder: Path, optimizer: str) -> Training:
    model = {"hf": str(folder / family)}
    name, audited = f"{family}-{optimizer}", family in ON_TWO
    base = Training(name, model=model, steps=8, accumulation=2, masked=0.2, audited=audited)
    return base if optimizer == "adamw" else replace(base, optimizer=SGD_UNCLIPPED, clip=None)


class OwnLoss(torch.nn.Module):
    """The model as its users build it, with the loss that it computes itself."""

    def __init__(self, folder: str, seed: int) -> None:
        super().__init__()
        transformers: Any = importlib.import_module("transformers")
        config = transformers.AutoConfig.from_pretrained(folder)
        for key in (
            "dropout",
            "attention_dropout",
            "hidden_dropout",
            "embd_pdrop",
            "resid_pdrop",
            "attn_pdrop",
        ):
            if hasattr(config, key):
                setattr(config, key, 0.0)
        torch.manual_seed(seed)
        self.own = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        output = self.own(input_ids=tokens, labels=targets, shift_labels=targets, num_items_in_batch=1)
        loss: torch.Tensor = output.loss
        return loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    configs = tmp_path_factory.mktemp("configs")
    for family in FAMILIES:
        write_config(configs / family, family)
    return configs


@pytest.fixture(scope="module")
def found(folder: Path, run_cases: RunCases) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for world in (1, 2):
        cases = [training(f, folder, o).on(lane) for f, lane, o in TRAINED if lane.world == world]
        results |= run_cases(cases, world)[0]
    return results


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Curve]:
    curves = {}
    for family in FAMILIES:
        for optimizer in ("adamw", "sgd"):
            asked = training(family, folder, optimizer)
            spec = Spec.model_validate(asked.on(REFERENCE).spec)
            curves[asked.name] = train(spec, OwnLoss(str(folder / family), spec.train.seed))
    return curves


@pytest.mark.parametrize(("family", "lane", "optimizer"), TRAINED, ids=str)
def test_losses_and_norms_are_those_of_a_plain_loop_with_the_library_s_own_loss(
    family: str, lane: Lane, optimizer: str, found: dict[str, Any], expected: dict[str, Curve]
) -> None:
    curve = expected[f"{family}-{optimizer}"]
    result = found[f"{family}-{optimizer}@{lane}"]
    assert len(result["losses"]) == 8
    assert curve.losses[-1] < curve.losses[0] - 0.02  # it learned something: the curves are no constants
    assert result["losses"] == pytest.approx(curve.losses, rel=TOLERANCE)
    assert result["norms"] == pytest.approx(curve.norms, rel=TOLERANCE)
