from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.sample_runs import sample_record
from xtrain.contract import Counter, Memory
from xtrain.records import record as record_module
from xtrain.records.record import (
    LossFacts,
    RankMemory,
    RecordError,
    RunRecord,
    load_record,
    write_record,
)
from xtrain.spec import dump_spec
from xtrain.spec.tree import Spec


def test_a_record_is_read_back_from_its_file_and_from_its_directory(tmp_path: Path) -> None:
    record = sample_record()
    write_record(tmp_path / "record.json", record)
    assert load_record(tmp_path / "record.json") == record
    assert load_record(tmp_path) == record


def test_every_key_is_written_and_what_is_unknown_is_null(tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", sample_record(speed=None, threads=None))
    written = json.loads((tmp_path / "record.json").read_text())
    assert set(written) == set(RunRecord.model_fields)
    assert written["schema_version"] == 1
    assert [written[key] for key in ("speed", "threads", "predicted", "failure")] == [None] * 4


def test_the_published_schema_has_the_agreed_keys() -> None:
    agreed = "status backend world spec settings notes environment data model totals loss eval speed"
    agreed += " time_split rank_seconds matmul busy memory predicted threads matmul_precision failure"
    agreed += " schema_version"
    assert set(agreed.split()) == set(RunRecord.model_fields)


def changed(**changes: Any) -> str:
    return json.dumps({**sample_record().model_dump(mode="json"), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Invalid JSON"),
        ("[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        ("[]", "Input should be an object"),
        ("{}", "status: Field required (16 more)"),
        (changed(schema_version=2), "schema_version: this xtrain reads version 1"),
        (changed(world=0), "world: Input should be greater than or equal to 1"),
        (changed(world="1"), "world: Input should be a valid integer"),
        (changed(status="fine"), "status: Input should be 'done', 'stopped', 'failed' or 'interrupted'"),
        (changed(settings={"a": [float("nan")]}), "settings: Value error, Out of range float values"),
        (changed(memory=[{"rank": -1}]), "memory.0.rank: Input should be greater than or equal to 0"),
        (
            changed(loss={"first": float("nan"), "last": 1.0, "min": 1.0}),
            "loss.first: Input should be a finite",
        ),
        (
            changed(speed={**sample_record().model_dump()["speed"], "p10": float("inf")}),
            "speed.p10: Input should be a finite number",
        ),
        (
            changed(speed={**sample_record().model_dump()["speed"], "p10": "1"}),
            "speed.p10: Input should be a valid number",
        ),
    ],
)
def test_a_damaged_record_is_refused_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "record.json"
    file.write_text(text)
    with pytest.raises(RecordError) as caught:
        load_record(file)
    assert str(caught.value).startswith(f"{file} is not a record: ")
    assert message in str(caught.value)


def test_bytes_that_are_not_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_bytes(b'{"status": "\xff"}')
    with pytest.raises(RecordError, match="Invalid JSON"):
        load_record(tmp_path)


def test_a_missing_or_too_large_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordError, match=r"record\.json: no such file; expected the record of a run"):
        load_record(tmp_path)
    (tmp_path / "record.json").write_text(changed())
    monkeypatch.setattr(record_module, "LARGEST_RECORD_BYTES", 100)
    with pytest.raises(RecordError, match="is too large for a record: more than 100 bytes"):
        load_record(tmp_path)


def test_keys_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(changed(carbon_grams=3))
    assert load_record(tmp_path) == sample_record()


def test_nan_cannot_get_into_a_record() -> None:
    with pytest.raises(ValidationError):
        LossFacts(first=float("nan"), last=None, min=None)


RESIDENT = Counter(7, 8, "counter")


def test_a_sampled_peak_stands_in_where_there_is_no_counter_and_says_so() -> None:
    memory = Memory(live=Counter(10, None, "unavailable"), reserved=None, categories={"parameters": 4})
    found = RankMemory.of(1, memory, RESIDENT, sampled_bytes=25)
    assert found.live is not None
    assert (found.live.bytes, found.live.peak_bytes, found.live.method) == (10, 25, "sampled")
    assert (found.rank, found.reserved, found.categories) == (1, None, {"parameters": 4})


def test_a_counted_peak_is_never_replaced_by_a_sample() -> None:
    memory = Memory(live=Counter(10, 30, "counter"), reserved=None, categories=None)
    live = RankMemory.of(0, memory, RESIDENT, sampled_bytes=25).live
    assert live is not None
    assert (live.peak_bytes, live.method) == (30, "counter")


def test_a_rank_without_live_counter_stays_without() -> None:
    memory = Memory(live=None, reserved=None, categories=None)
    assert RankMemory.of(0, memory, RESIDENT, sampled_bytes=25).live is None


def test_a_rank_travels_as_json() -> None:
    memory = Memory(live=Counter(10, 30, "counter"), reserved=None, categories=None)
    there = RankMemory.of(0, memory, RESIDENT)
    assert RankMemory.model_validate(json.loads(json.dumps(there.model_dump(mode="json")))) == there


def test_the_spec_is_recorded_whole_under_the_names_of_its_file() -> None:
    spec = Spec.model_validate(
        {
            "model": {"factory": "mine:build", "args": {"cap": float("inf")}},
            "data": {"source": "synthetic"},
            "batch": {"global": 8},
            "train": {"steps": 2},
            "optimizer": {"lr": 1e-3},
        }
    )
    recorded: Any = dump_spec(spec)
    assert recorded["batch"] == {"global": 8, "micro": None}
    assert recorded["model"]["args"] == {"cap": None}
    assert recorded["schedule"]["name"] == "cosine"
    assert Spec.model_validate({**recorded, "model": {"factory": "mine:build"}}).train.steps == 2
