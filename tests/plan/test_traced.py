"""Models that are not built in, planned by shapes alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from benchmarks.plan_accuracy import outcomes
from benchmarks.plan_cases import BF16_WEIGHTS, Case
from benchmarks.plan_measure import measure
from tests.models.families import write_config
from tests.plan.test_step import plan
from tests.small_runs import SPEC
from xtrain.contract import MEMORY_CATEGORIES

WORST, TOTAL_ERROR = 0.12, 0.02
"""Of a category that is more than a negligible part, and of all."""
CASES = [
    Case(hf={}),
    Case(hf={}, precision="bf16", accumulation=1),
    Case(hf={"num_hidden_layers": 6}, checkpointing="auto", precision=BF16_WEIGHTS),
    Case(hf={}, checkpointing={"every": 1}),
    Case(hf={"vocab_size": 300}, checkpointing={"selective": {"ops": "cheap"}}),
    Case(hf={"tie_word_embeddings": True, "vocab_size": 4000}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_llama_s_peak_is_predicted(case: Case) -> None:
    (found,) = outcomes(case, measure(case))
    assert abs(found.error) <= TOTAL_ERROR, (found.predicted, found.measured)
    wrong = [name for name in MEMORY_CATEGORIES if found.holds(name) and found.category_error(name) > WORST]
    assert not wrong, (found.predicted, found.measured)
    assert found.predicted["parameters"] == found.measured["parameters"]
    assert abs(found.predicted["optimizer"] - found.measured["optimizer"]) < 1000  # counts of updates


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, hidden):  # type: ignore[no-untyped-def]
        return hidden + self.down(self.up(hidden).relu())


class Own(nn.Module):
    """Tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, 16)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(16, 257)

    def forward(self, tokens):  # type: ignore[no-untyped-def]
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def build() -> nn.Module:
    return Own()


def build_by_numbers() -> nn.Module:
    model = Own()
    assert float(model.head.weight.sum()) < 1e9
    return model


PRESET = "model: {preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}"


def spec_with(folder: Path, model: str) -> Path:
    path = folder / "spec.yaml"
    path.write_text(SPEC.replace(PRESET, model))
    return path


def test_a_model_of_one_s_own_is_planned(tmp_path: Path) -> None:
    spec = spec_with(tmp_path, "model: {factory: 'tests.plan.test_traced:build'}")
    told = json.loads(plan(spec, "--json", "--device-memory", "1GiB").stdout)
    assert told["parameters"] == sum(p.numel() for p in Own().parameters())
    assert told["fits"]
    assert told["largest_micro"] == 4
    assert [rung["fits"] for rung in told["ladder"]].count(None) == 0


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2", "qwen2"])
def test_families_of_the_library_are_planned(tmp_path: Path, family: str) -> None:
    spec = spec_with(tmp_path, f"model: {{hf: '{write_config(tmp_path / 'model', family)}'}}")
    told = json.loads(plan(spec, "--json").stdout)
    assert told["peak_bytes"]["activations"] > 0


def test_a_model_that_needs_numbers_is_refused_with_what_works(tmp_path: Path) -> None:
    result = plan(spec_with(tmp_path, "model: {factory: 'tests.plan.test_traced:build_by_numbers'}"))
    assert result.exit_code == 2
    assert "--formula estimates any size" in result.stderr
