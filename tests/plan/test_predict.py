"""Every run says beforehand what a step will hold, and its record has both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import run
from xtrain.models.source import PresetSource
from xtrain.plan.predict import predict
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
    from xtrain import registry

    return predict(spec, 1, registry.load(name), 257, Engine())  # type: ignore[arg-type]


def test_a_prediction_builds_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(source: PresetSource) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(PresetSource, "build", build)
    monkeypatch.setattr(PresetSource, "skeleton", build)
    assert predicted_on("cpu", spec_of()).peak_bytes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": {"factory": "some.module:build"}}, "built-in"),
        ({"model": {**MODEL, "dropout": 0.1}}, "dropout"),
        ({"train": {"steps": 3, "compile": True}}, "compiled"),
    ],
)
def test_the_reason_is_told_where_there_is_no_prediction(changes: Any, reason: str) -> None:
    found = predicted_on("cpu", spec_of(**changes))
    assert found.peak_bytes is None
    assert reason in (found.reason or "")


def test_the_vocabulary_is_that_of_the_data() -> None:
    from xtrain import registry

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
