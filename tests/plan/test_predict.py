"""Every run says beforehand what a step will hold, and its record has both."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.plan.test_traced import Own
from tests.small_runs import SPEC, run
from xtrain import registry
from xtrain.models.adapter import LogitsLoss
from xtrain.models.outline import outline
from xtrain.models.source import PresetSource
from xtrain.plan.predict import predict
from xtrain.plan.traced import Tracer
from xtrain.records.record import Predicted, load_record, prediction
from xtrain.records.summary import format_prediction, predicted_at
from xtrain.spec.tree import Spec

MODEL = {"preset": "gpt2-nano", "layers": 1, "hidden": 32, "heads": 2}
MIB = 1 << 20


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_records_and_prints_predicted_beside_measured(tmp_path: Path, precision: str) -> None:
    result = run(tmp_path, "--out", tmp_path / "out", backend="cpu", train__steps=3, precision=precision)
    record = load_record(tmp_path / "out")
    (memory,) = record.memory
    assert memory.step_peaks is not None
    told = prediction(record)
    assert told is not None
    assert told.peak_bytes is not None
    predicted, measured = told.peak_bytes["cpu"], memory.step_peaks.peaks["cpu"]
    total = sum(measured.values())
    assert abs(sum(predicted.values()) - total) <= 0.05 * total
    for category in {*predicted, *measured}:
        assert abs(predicted.get(category, 0) - measured.get(category, 0)) <= 0.05 * total, category
    rows = result.stdout.splitlines()
    place = next(i for i, row in enumerate(rows) if row.startswith("memory, a step on cpu"))
    assert rows[place + 1].startswith("memory, as predicted")
    assert "%): parameters" in rows[place + 1]


def test_what_cannot_be_predicted_is_null_and_printed_as_such(tmp_path: Path) -> None:
    result = run(tmp_path, "--out", tmp_path / "out", train__steps=3)
    predicted = prediction(load_record(tmp_path / "out"))
    assert predicted == Predicted(reason="backend null does not say how it lays out memory")
    assert "not predicted: backend null does not say how it lays out memory" in result.stdout


class Engine:
    """Holds nothing, of so many parameters; a prediction asks no more of it."""

    parameter_count = 1000

    def holdings(self) -> dict[str, Any]:
        return {}


def spec_of(**changes: Any) -> Spec:
    tree: dict[str, Any] = {
        "model": MODEL,
        "data": {"source": "synthetic", "seq_len": 16},
        "batch": {"global": 4, "micro": 2},
        "train": {"steps": 3},
        "optimizer": {"lr": 1e-3},
    }
    return Spec.model_validate({**tree, **changes})


def predicted_on(name: str, spec: Spec) -> Predicted:
    return predict(spec, 1, registry.load(name), 257, Engine())  # type: ignore[arg-type]


def test_a_prediction_builds_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(source: PresetSource) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(PresetSource, "build", build)
    monkeypatch.setattr(PresetSource, "skeleton", build)
    assert predicted_on("cpu", spec_of()).peak_bytes


def test_the_reason_is_told_where_there_is_no_prediction() -> None:
    found = predicted_on("cpu", spec_of(train={"steps": 3, "compile": True}))
    assert found.peak_bytes is None
    assert found.reason == "compiled code fuses what the planner counts one by one"


FACTORY = {"factory": "tests.plan.test_traced:build"}


def test_a_model_that_cannot_be_copied_is_not_predicted_and_why_is_told() -> None:
    why = "the model cannot be copied: TypeError: no"
    found = predict(spec_of(model=FACTORY), 1, registry.load("cpu"), 257, Engine(), why)  # type: ignore[arg-type]
    assert (found.peak_bytes, found.reason) == (None, why)


class Stubborn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def __deepcopy__(self, memo: Any) -> None:
        raise TypeError("no")


def test_an_outline_has_the_shapes_and_ties_of_a_model_and_none_of_its_numbers() -> None:
    model = Own()
    model.head.weight = model.embedding.weight  # tied
    copy = outline(model)
    assert isinstance(copy, nn.Module)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert {name: p.shape for name, p in copy.named_parameters()} == shapes
    assert {p.device.type for p in copy.parameters()} == {"meta"}
    assert copy.get_parameter("head.weight") is copy.get_parameter("embedding.weight")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert "the model cannot be copied: TypeError: no" in str(outline(Stubborn()))


def test_a_run_of_a_model_of_one_s_own_is_predicted(tmp_path: Path) -> None:
    spec = SPEC.replace(
        "{preset: gpt2-nano, layers: 1, hidden: 32, heads: 2}", str(FACTORY).replace("'", '"')
    )
    run(tmp_path, "--out", tmp_path / "out", backend="cpu", spec=spec, train__steps=3)
    record = load_record(tmp_path / "out")
    (memory,) = record.memory
    told = prediction(record)
    assert memory.step_peaks is not None
    assert told is not None
    assert told.peak_bytes is not None, told.reason
    measured = sum(memory.step_peaks.peaks["cpu"].values())
    assert sum(told.peak_bytes["cpu"].values()) == pytest.approx(measured, rel=0.12)


def drawn() -> tuple[torch.Tensor, float]:
    return torch.rand(1), random.random()


def test_tracing_draws_no_random_numbers() -> None:
    copy, spec = outline(LogitsLoss(Drawing(), "a test")), spec_of(model=FACTORY)
    assert isinstance(copy, nn.Module)
    torch.manual_seed(5)
    random.seed(5)
    expected = drawn()
    torch.manual_seed(5)
    random.seed(5)
    Tracer(spec, copy)(spec)
    assert drawn() == expected


class Drawing(Own):
    """Has dropout, and draws numbers of its own."""

    def forward(self, tokens):  # type: ignore[no-untyped-def]
        random.random()
        logits = super().forward(tokens)  # type: ignore[no-untyped-call]
        return nn.functional.dropout(logits, 0.5)


def test_the_vocabulary_is_that_of_the_data() -> None:
    few, many = (
        predict(spec_of(), 1, registry.load("cpu"), size, Engine())  # type: ignore[arg-type]
        for size in (257, 5000)
    )
    assert few.peak_bytes
    assert many.peak_bytes
    assert many.peak_bytes["cpu"]["parameters"] - few.peak_bytes["cpu"]["parameters"] == 4 * 32 * (5000 - 257)


def test_processes_on_devices_of_one_kind_share_a_prediction() -> None:
    predicted = Predicted(peak_bytes={"cuda:0": {"parameters": MIB}, "cpu": {"optimizer": 2 * MIB}})
    assert predicted_at("cuda:1", predicted) == {"parameters": MIB}
    assert predicted_at("cpu", predicted) == {"optimizer": 2 * MIB}
    assert predicted_at("mps:0", predicted) is None
    assert predicted_at("cpu", None) is None


def test_a_prediction_is_printed_with_its_error() -> None:
    assert format_prediction({"parameters": 3 * MIB}, 2 * MIB) == "3.0 MiB (+50.0%): parameters 3.0 MiB"
    assert format_prediction({"parameters": MIB}, 0) == "1.0 MiB: parameters 1.0 MiB"
