"""Stopped and gone on with: nothing lost, nothing twice, nothing changed by a request that is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

import xtrain.prepare
from tests import mounts
from tests.checkpoints.test_commands import command
from tests.small_runs import SPEC, checkpoints, metrics, run, steps, weights
from xtrain.checkpoints.format import MANIFEST, STATE, manifest_bytes
from xtrain.checkpoints.manager import Checkpointer
from xtrain.launching.watchdog import Watchdog
from xtrain.records.metrics import MetricsLog
from xtrain.records.record import load_record
from xtrain.resume import MAY_CHANGE, differences
from xtrain.spec.keys import covering

ALL = list(range(1, 13))
Property = Callable[[str, object], None]
"""pytest's record_property: figures for docs/proofs.md."""


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stopped(folder: Path, after: int = 6, **options: Any) -> Path:
    """A run directory that was left after that many of its 12 updates."""
    out = folder / "out"
    assert run(folder, "--out", out, "--stop-after", after, **options).exit_code == 0
    return out


def died(out: Path, after: int) -> None:
    """As if the process had been killed after that many updates, past its last checkpoint."""
    log = MetricsLog(out / "metrics.jsonl")
    last = metrics(out)[-1]
    for step in range(last.step + 1, after + 1):
        log.append(type(last)(step, 99.0, 0.0, None, 1, None, False))
    log.close()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    (out / "record.json").unlink()


@pytest.mark.parametrize("backend", ["null", "cpu"])
def test_a_stopped_run_goes_on_to_the_end(tmp_path: Path, backend: str) -> None:
    out = stopped(tmp_path, backend=backend)
    result = run(tmp_path, "--resume", out, backend=backend)
    assert result.exit_code == 0
    assert f"resumed from {out}/checkpoints/step-00000006, after step 6" in result.stderr
    assert steps(out) == ALL
    assert load_record(out).status == "done"
    assert load_record(out).totals.steps == 12


def forge_extras(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Another state.json, and a manifest that fits it."""
    stored = json.loads((folder / STATE).read_text())
    data = json.dumps({**stored, "extras": [change(stored["extras"][0])]}).encode()
    (folder / STATE).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][STATE] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_bytes(manifest_bytes(manifest))


DROPOUT: dict[str, Any] = {"model__dropout": 0.1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        DROPOUT,
        {"optimizer": "{name: sgd, lr: 0.1, momentum: 0.9}"},
        {"precision": "{dtype: bf16, weights: bf16}"},
        {"stability": "{loss_spike: 3, window: 3}"},
        {"checkpoint": "{every_steps: 1, background: true}"},
    ],
    ids=["adamw", "dropout", "sgd", "bf16 weights", "guards", "background"],
)
def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(
    tmp_path: Path, options: dict[str, Any], record_property: Property
) -> None:
    whole = tmp_path / "whole"
    assert run(tmp_path, "--out", whole, backend="cpu", **options).exit_code == 0
    out = stopped(tmp_path, 5, backend="cpu", **options)
    assert run(tmp_path, "--resume", out, "--stop-after", 9, backend="cpu", **options).exit_code == 0
    assert run(tmp_path, "--resume", out, backend="cpu", **options).exit_code == 0
    assert weights(out, 12) == weights(whole, 12)
    assert [line.loss for line in metrics(out)] == [line.loss for line in metrics(whole)]
    record_property("resumes", 2)
    record_property("bytes of weights and moments that are the same", len(weights(out, 12)))


def test_other_weights_are_told_apart(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(tmp_path, "--out", whole, backend="cpu", **DROPOUT)
    out = stopped(tmp_path, 5, backend="cpu", **DROPOUT)
    # Without the random states dropout draws what it drew in the first steps.
    forge_extras(out / "checkpoints" / "step-00000005", lambda extras: {**extras, "random": {}})
    run(tmp_path, "--resume", out, backend="cpu", **DROPOUT)
    assert weights(out, 12) != weights(whole, 12)


def test_every_step_has_one_line_although_the_run_died_past_its_checkpoint(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run(tmp_path, "--out", whole)
    out = stopped(tmp_path, 4)
    died(out, after=7)
    assert run(tmp_path, "--resume", out).exit_code == 0
    assert steps(out) == ALL
    assert [line.loss for line in metrics(out)] == [line.loss for line in metrics(whole)]
    assert load_record(out).totals.tokens == load_record(whole).totals.tokens


def test_without_a_checkpoint_it_starts_at_step_0_and_says_so(
    tmp_path: Path, record_property: Property
) -> None:
    out = stopped(tmp_path, 3)
    shutil.rmtree(out / "checkpoints")
    (out / "checkpoints" / ".step-00000003.77").mkdir(parents=True)  # it died while saving
    result = run(tmp_path, "--resume", out)
    assert result.exit_code == 0
    assert f"{out} has no checkpoint yet: starting at step 0" in result.stderr
    assert steps(out) == ALL
    record_property("resumes", 1)


def test_what_is_not_there_cannot_be_resumed(tmp_path: Path) -> None:
    result = run(tmp_path, "--resume", tmp_path / "missing")
    assert result.exit_code == 2
    assert f"error: --resume {tmp_path}/missing: not there; expected a run directory" in result.stderr


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    result = run(tmp_path, "--resume", tmp_path / "photos")
    assert result.exit_code == 2
    assert "is not a run directory" in result.stderr
    assert list((tmp_path / "photos").iterdir()) == []


def test_a_finished_run_goes_on_with_more_steps(tmp_path: Path, record_property: Property) -> None:
    out = tmp_path / "out"
    run(tmp_path, "--out", out)
    assert run(tmp_path, "--resume", out, train__steps=15).exit_code == 0
    assert steps(out) == list(range(1, 16))
    assert load_record(out).totals.steps == 15
    record_property("resumes", 1)


@pytest.mark.parametrize("wanted", [12, 10])
def test_a_finished_run_without_more_steps_stays_as_it_is_and_says_so(
    tmp_path: Path, wanted: int, record_property: Property
) -> None:
    out = tmp_path / "out"
    run(tmp_path, "--out", out)
    before = (out / "metrics.jsonl").read_bytes(), checkpoints(out)
    result = run(tmp_path, "--resume", out, train__steps=wanted)
    assert result.exit_code == 0
    assert f"nothing to do up to step {wanted}; set train.steps to go further" in result.stderr
    assert "go on with" not in result.stderr
    assert ((out / "metrics.jsonl").read_bytes(), checkpoints(out)) == before
    assert load_record(out).status == "done"
    record_property("resumes", 1)


CHANGED = {"optimizer.lr": "0.002 there, 0.001 here", "train.seed": "1234 there, 7 here"}


def test_a_changed_spec_is_refused_by_name_and_touches_nothing(tmp_path: Path) -> None:
    out = stopped(tmp_path, 4)
    died(out, after=6)
    before = files(out)
    result = run(tmp_path, "--resume", out, optimizer__lr=1e-3, train__seed=7, memory__loss_chunk=8)
    assert result.exit_code == 2
    listed = "".join(f"  {key}: {change}\n" for key, change in CHANGED.items())
    assert f"is of another training:\n{listed}" in result.stderr
    assert "memory.loss_chunk" not in result.stderr
    assert "Use --allow-changed to insist" in result.stderr
    assert files(out) == before


def test_whoever_insists_goes_on_with_a_changed_spec(tmp_path: Path) -> None:
    out = stopped(tmp_path)
    assert run(tmp_path, "--resume", out, "--allow-changed", optimizer__lr=1e-3).exit_code == 0
    assert steps(out) == ALL
    assert run(tmp_path, "--resume", out, optimizer__lr=1e-3, train__steps=13).exit_code == 0


def test_other_data_is_another_training_too(tmp_path: Path) -> None:
    data: dict[str, Any] = {"data__tokens": 30_000}
    out = stopped(tmp_path)
    result = run(tmp_path, "--resume", out, **data)
    assert result.exit_code == 2
    assert "  the data itself: hash " in result.stderr
    assert run(tmp_path, "--resume", out, "--allow-changed", **data).exit_code == 0


TEXT = SPEC.replace("{source: synthetic, seq_len: 16, tokens: 20_000}", "{source: text, seq_len: 16}")


def test_data_may_lie_elsewhere_as_long_as_it_is_the_same(tmp_path: Path) -> None:
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("some text of a few letters " * 200)
    out = stopped(tmp_path, spec=TEXT, data__path=first)
    first.rename(second)
    assert run(tmp_path, "--resume", out, "--stop-after", 8, spec=TEXT, data__path=second).exit_code == 0
    second.write_text("other text of a few letters " * 200)
    result = run(tmp_path, "--resume", out, spec=TEXT, data__path=second)
    assert result.exit_code == 2
    assert "  the data itself: hash " in result.stderr


def test_the_weights_that_a_run_began_with_are_not_needed_to_go_on(tmp_path: Path) -> None:
    start = stopped(tmp_path, backend="cpu")
    old = start.rename(tmp_path / "start")
    begun: dict[str, Any] = {"backend": "cpu", "model__init_from": old}
    whole = tmp_path / "whole"
    assert run(tmp_path, "--out", whole, **begun).exit_code == 0
    out = stopped(tmp_path, **begun)
    shutil.rmtree(old)
    assert run(tmp_path, "--resume", out, "--stop-after", 8, **begun).exit_code == 0
    moved: dict[str, Any] = {**begun, "model__init_from": tmp_path / "elsewhere"}
    assert run(tmp_path, "--resume", out, **moved).exit_code == 0
    assert weights(out, 12) == weights(whole, 12)


def test_the_weights_that_a_run_begins_with_are_needed_where_nothing_was_saved_yet(tmp_path: Path) -> None:
    out = stopped(tmp_path, backend="cpu")
    shutil.rmtree(out / "checkpoints")
    result = run(tmp_path, "--resume", out, backend="cpu", model__init_from=tmp_path / "missing")
    assert result.exit_code == 2
    assert f"error: model.init_from: {tmp_path}/missing: not there; expected a run directory" in result.stderr


def test_other_optimizers_and_models_are_insisted_on_without_a_traceback(tmp_path: Path) -> None:
    out = stopped(tmp_path, backend="cpu")
    before = files(out)
    wider = run(tmp_path, "--resume", out, "--allow-changed", backend="cpu", model__hidden=64)
    assert wider.exit_code == 2
    assert "step-00000006 does not fit this model: weight of " in wider.stderr
    assert files(out) == before
    sgd = run(tmp_path, "--resume", out, "--allow-changed", backend="cpu", optimizer="{name: sgd, lr: 0.1}")
    assert sgd.exit_code == 0
    assert steps(out) == ALL


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def foreign(file: Path) -> None:
    file.write_bytes(b"PK\x03\x04 something else")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = [
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "optimizer-00001-of-00001.safetensors",
    "optimizer.safetensors.index.json",
    "state.json",
    "manifest.json",
]


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate: "truncated",
    flip: "with one byte flipped",
    foreign: "replaced",
    Path.unlink: "removed",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_kept_aside_and_the_one_before_is_used(
    tmp_path: Path,
    whole_run: Path,
    file: str,
    damage: Callable[[Path], None],
    record_property: Property,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole_run / "stopped", out)
    died(out, after=8)
    broken = out / "checkpoints" / "step-00000006" / file
    damage(broken)
    kept = files(broken.parent)
    verified = command("verify", broken.parent)
    assert verified.exit_code == 1
    assert str(broken) in verified.stderr
    result = run(tmp_path, "--resume", out, backend="cpu")
    assert result.exit_code == 0
    assert f"warning: {'cannot read ' if damage is Path.unlink else ''}{broken}" in result.stderr or (
        f"warning: {broken} is damaged: it is missing" in result.stderr
    )
    assert f"resumed from {out}/checkpoints/step-00000004, after step 4" in result.stderr
    aside = out / "checkpoints" / "damaged-1"
    assert f"damaged checkpoints are kept in {aside}" in result.stderr
    assert [*files(aside / "step-00000006").values()] == [*kept.values()]
    assert weights(out, 12) == weights(whole_run / "whole", 12)
    assert steps(out) == ALL
    assert checkpoints(out) == [4, 8, 12]
    record_property(f"files {DAMAGES[damage]}", 1)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that ended and one that was stopped after 6 updates."""
    folder = tmp_path_factory.mktemp("runs")
    assert run(folder, "--out", folder / "whole", backend="cpu").exit_code == 0
    assert run(folder, "--out", folder / "stopped", "--stop-after", 6, backend="cpu").exit_code == 0
    return folder


def test_random_states_that_are_none_are_named_and_nothing_is_lost(tmp_path: Path) -> None:
    out = stopped(tmp_path, backend="cpu")
    folder = out / "checkpoints" / "step-00000006"
    forge_extras(folder, lambda extras: {"random": {"cpu": "!"}, "optimizer_steps": 1})
    before = files(out)
    result = run(tmp_path, "--resume", out, backend="cpu")
    assert result.exit_code == 2
    assert f"{folder}/state.json is damaged: extras or guards: " in result.stderr
    assert "Traceback" not in result.stderr
    assert files(out) == before


def test_a_damaged_one_that_was_named_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    out = stopped(tmp_path)
    flip(out / "checkpoints" / "step-00000006" / "state.json")
    before = files(out)
    result = run(tmp_path, "--resume", out / "checkpoints" / "step-00000006")
    assert result.exit_code == 2
    assert f"; the one before it: --resume {out}/checkpoints/step-00000004\n" in result.stderr
    assert files(out) == before
    assert run(tmp_path, "--resume", out / "checkpoints" / "step-00000004").exit_code == 0
    assert steps(out) == ALL


def test_a_disk_that_hangs_while_a_broken_run_leaves_is_watched_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for owner, name in ((Checkpointer, "close"), (Watchdog, "__exit__")):
        plain = getattr(owner, name)

        def noted(one: Any, *words: Any, plain: Callable[..., Any] = plain, name: str = name) -> Any:
            order.append(name)
            return plain(one, *words)

        monkeypatch.setattr(owner, name, noted)
    assert run(tmp_path, "--out", tmp_path / "out").exit_code == 0
    assert order == ["close", "__exit__"]


def test_metrics_that_are_gone_are_told(tmp_path: Path) -> None:
    out = stopped(tmp_path)
    (out / "metrics.jsonl").unlink()
    result = run(tmp_path, "--resume", out)
    assert result.exit_code == 0
    assert "warning: there are no metrics of the steps up to 6: the record will lack them" in result.stderr
    assert steps(out) == ALL[6:]


def test_metrics_that_end_too_early_are_refused_with_what_to_do(tmp_path: Path) -> None:
    out = stopped(tmp_path)
    log = out / "metrics.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:5]))
    before = files(out)
    result = run(tmp_path, "--resume", out)
    assert result.exit_code == 2
    assert f"{log} ends at step 5, before step 6 of the checkpoint; move it away to go on" in result.stderr
    assert files(out) == before


def test_a_damaged_line_of_old_metrics_costs_the_record_and_not_the_training(tmp_path: Path) -> None:
    out = stopped(tmp_path)
    log = out / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([b"{}\n", *lines[1:]]))
    result = run(tmp_path, "--resume", out)
    assert result.exit_code == 1
    assert f"error: cannot write {out / 'record.json'}: {log}, line 1: step: Field required" in result.stderr
    assert checkpoints(out)[-1] == 12


@pytest.mark.parametrize("garbage", [b"not a line\n", b"\xff" * (2 << 20), b'{"step": 3}\n'])
def test_garbage_after_the_checkpoints_step_is_cut(tmp_path: Path, garbage: bytes) -> None:
    out = stopped(tmp_path)
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(garbage)
    assert run(tmp_path, "--resume", out).exit_code == 0
    assert steps(out) == ALL


def test_a_wrong_path_is_told_before_the_data_is_read(tmp_path: Path) -> None:
    occupied = stopped(tmp_path)
    for option, path in (("--resume", tmp_path / "missing"), ("--out", occupied)):
        result = run(tmp_path, option, path)
        assert result.exit_code == 2
        assert "data synthetic" not in result.stderr


def test_going_back_to_an_older_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, "--out", out)
    older = out / "checkpoints" / "step-00000004"
    assert run(tmp_path, "--resume", older, "--stop-after", 5).exit_code == 0
    assert steps(out) == [1, 2, 3, 4, 5]
    assert checkpoints(out) == [4, 5]
    aside = out / "checkpoints" / "superseded-1"
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000008", "step-00000012"]
    assert run(tmp_path, "--resume", out).exit_code == 0
    assert steps(out) == ALL
    assert checkpoints(out) == [5, 8, 12]


def test_going_back_that_is_cut_short_leaves_a_run_that_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(tmp_path, "--out", out)
    before = metrics(out)
    older = out / "checkpoints" / "step-00000004"
    for name in ("set_aside_after", "truncate_after"):
        with monkeypatch.context() as dies:
            owner = MetricsLog if name == "truncate_after" else xtrain.prepare
            dies.setattr(owner, name, lambda *_: sys.exit(9))
            assert run(tmp_path, "--resume", older).exit_code == 9
        assert metrics(out) == before
        assert run(tmp_path, "--resume", out, "--stop-after", checkpoints(out)[-1]).exit_code == 0
    assert steps(out) == [1, 2, 3, 4]
    assert checkpoints(out) == [4]


def test_where_lines_are_missing_before_it_nothing_is_set_aside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, "--out", out)
    log = out / "metrics.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:3]))
    assert run(tmp_path, "--resume", out / "checkpoints" / "step-00000004").exit_code == 2
    assert checkpoints(out) == [4, 8, 12]


def test_a_resumed_run_can_be_continued_elsewhere_and_leaves_the_first_as_it_is(tmp_path: Path) -> None:
    first, second = tmp_path / "out", tmp_path / "second"
    run(tmp_path, "--out", first)
    before = files(first)
    older = first / "checkpoints" / "step-00000008"
    assert run(tmp_path, "--resume", older, "--out", second, train__steps=14).exit_code == 0
    assert steps(second) == list(range(1, 15))
    assert files(first) == before
    assert run(tmp_path, "--resume", older, "--out", second).exit_code == 2


def test_going_on_elsewhere_needs_something_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    result = run(tmp_path, "--resume", tmp_path / "photos", "--out", tmp_path / "second")
    assert result.exit_code == 2
    assert f"error: {tmp_path}/photos is not a run directory: found none of" in result.stderr
    assert not (tmp_path / "second").exists()


def test_a_superseded_checkpoint_goes_on_elsewhere_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, "--out", out)
    run(tmp_path, "--resume", out / "checkpoints" / "step-00000004", "--stop-after", 5)
    aside = out / "checkpoints" / "superseded-1" / "step-00000008"
    result = run(tmp_path, "--resume", aside)
    assert result.exit_code == 2
    assert f"error: --resume {aside}: found a checkpoint outside of a run's checkpoints; it" in result.stderr
    assert result.stderr.endswith("add --out DIR\n")
    assert run(tmp_path, "--resume", aside, "--out", tmp_path / "second").exit_code == 0
    assert steps(tmp_path / "second") == ALL[8:]


@pytest.mark.parametrize(
    ("place", "named", "reached"),
    [
        ("checkpoints", "step-00000004", 5),
        ("checkpoints", ".", 7),
        ("checkpoints/step-00000004", "..", 7),
        ("checkpoints/step-00000004", ".", 5),
        (".", "checkpoints/step-00000004", 5),
        (".", "checkpoints", 7),
        (".", ".", 7),
    ],
)
def test_a_checkpoint_can_be_named_from_inside_of_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, named: str, reached: int
) -> None:
    out = stopped(tmp_path)
    monkeypatch.chdir(out / place)
    result = run(tmp_path, "--resume", named, "--stop-after", reached)
    assert result.exit_code == 0, result.stderr
    assert steps(out) == ALL[:reached]


def test_a_continuation_elsewhere_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    out = stopped(tmp_path, backend="null")
    result = run(tmp_path, "--resume", out, "--out", tmp_path / "second", backend="cpu")
    assert result.exit_code == 2  # the null backend's checkpoints have no weights
    assert "does not fit this model: the state has no weight of " in result.stderr
    assert not (tmp_path / "second").exists()


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(tmp_path, "--out", out, train__steps=30, checkpoint__keep=2)
    assert checkpoints(out) == [28, 30]


def test_the_best_is_kept_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    checkpoint = "{every_steps: 4, keep: 1, best: true}"
    run(tmp_path, "--out", out, checkpoint=checkpoint, train__eval_every=3)
    # The null backend's held-out loss never changes: the first is the lowest.
    assert checkpoints(out) == [3, 12]
    run(tmp_path, "--resume", out, checkpoint=checkpoint, train__eval_every=3, train__steps=16)
    assert checkpoints(out) == [3, 16]


@pytest.mark.parametrize("elsewhere", [True, False], ids=["of another run", "removed by hand"])
def test_a_best_that_the_run_does_not_have_gives_way_to_the_next(tmp_path: Path, elsewhere: bool) -> None:
    options: dict[str, Any] = {"checkpoint": "{every_steps: 4, keep: 1, best: true}", "train__eval_every": 3}
    first, out = tmp_path / "first", tmp_path / ("out" if elsewhere else "first")
    assert run(tmp_path, "--out", first, **options).exit_code == 0
    assert checkpoints(first) == [3, 12]
    if not elsewhere:
        shutil.rmtree(first / "checkpoints" / "step-00000003")
    words = ("--resume", first, *(("--out", out) if elsewhere else ()))
    assert run(tmp_path, *words, **options, train__steps=16).exit_code == 0
    assert checkpoints(out) == [15, 16]


def test_keys_that_may_change_exist_and_those_of_what_is_learned_are_not_among_them() -> None:
    for key in (
        "optimizer.lr",
        "batch.global",
        "model.layers",
        "schedule.warmup",
        "precision.dtype",
        "train.seed",
    ):
        assert covering(key, MAY_CHANGE) is None
    assert covering("memory.sharding", MAY_CHANGE)


def test_differences_are_told_by_their_whole_key() -> None:
    old: dict[str, Any] = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    new: dict[str, Any] = {"a": {"b": 1, "c": [1, 3]}, "e": {"f": 1}}
    assert list(differences(old, new)) == [("a.c", [1, 2], [1, 3]), ("e", None, {"f": 1})]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one checkpoint of this model, not for two."""
    with mounts.small_disk(tmp_path / "disk", "1000k") as disk:
        yield disk


def refused(result: Result) -> int:
    return result.stderr.count(" was not saved: ")


def test_a_full_disk_is_told_and_costs_only_what_did_not_fit(
    tmp_path: Path, small_disk: Path, record_property: Property
) -> None:
    out = small_disk / "out"
    result = run(tmp_path, "--out", out, backend="cpu")
    assert result.exit_code == 1
    warning = f"warning: checkpoint {out}/checkpoints/step-00000008 was not saved: "
    assert warning in result.stderr
    assert "No space left on device" in result.stderr
    assert "step-00000012 was not saved: " in result.stderr
    assert "Traceback" not in result.stderr
    assert steps(out) == ALL  # training went on
    assert (load_record(out).status, checkpoints(out)) == ("failed", [4])
    record_property("saves that did not fit", refused(result))


def test_a_full_disk_is_told_and_costs_only_what_did_not_fit_in_the_background(
    tmp_path: Path, small_disk: Path, record_property: Property
) -> None:
    out = small_disk / "out"
    result = run(tmp_path, "--out", out, backend="cpu", checkpoint__background="true")
    assert result.exit_code == 1
    for step in ("08", "12"):
        reason = "was not saved: No space left on device"
        assert result.stderr.count(f"checkpoint {out}/checkpoints/step-000000{step} {reason}") == 1
    assert steps(out) == ALL
    assert (load_record(out).status, checkpoints(out)) == ("failed", [4])
    assert run(tmp_path, "--resume", out, "--out", tmp_path / "second", backend="cpu").exit_code == 0
    record_property("saves that did not fit", refused(result))


def resumed_against(obstacle: AbstractContextManager[int], out: Path, background: str) -> Result:
    """A run that nothing can save trains to its end and says why; what was saved before it stays."""
    before = files(out / "checkpoints")
    with obstacle as reason:
        result = run(out.parent, "--resume", out, backend="cpu", checkpoint__background=background)
    assert result.exit_code == 1
    assert f"step-00000008 was not saved: {os.strerror(reason)}; earlier ones are intact" in result.stderr
    assert "Traceback" not in result.stderr
    assert steps(out) == ALL
    assert files(out / "checkpoints") == before
    return result


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_folder_that_became_read_only_is_told_and_costs_nothing(
    tmp_path: Path, background: str, record_property: Property
) -> None:
    out = stopped(tmp_path, 4, backend="cpu")
    result = resumed_against(mounts.read_only(out / "checkpoints"), out, background)
    assert checkpoints(out) == [4]
    record_property("saves refused by a read-only folder", refused(result))


@pytest.mark.parametrize("background", ["true", "false"])
def test_files_that_may_not_grow_are_told_and_cost_nothing(
    tmp_path: Path, background: str, record_property: Property
) -> None:
    """The nearest thing to a full disk that any user can have: every write of tensors fails half-way."""
    out = stopped(tmp_path, 4, backend="cpu")
    result = resumed_against(mounts.limited_files(64 << 10), out, background)
    assert run(tmp_path, "--resume", out, backend="cpu").exit_code == 0
    assert checkpoints(out) == [4, 8, 12]
    record_property("saves that did not fit", refused(result))


def test_a_full_disk_stops_a_run_that_asked_for_it(
    tmp_path: Path, small_disk: Path, record_property: Property
) -> None:
    out = small_disk / "out"
    result = run(tmp_path, "--out", out, backend="cpu", checkpoint__on_error="stop")
    assert result.exit_code == 1
    assert "error: checkpoint " in result.stderr
    assert "(checkpoint.on_error is stop); earlier ones are intact" in result.stderr
    assert steps(out) == list(range(1, 9))
    assert (load_record(out).status, checkpoints(out)) == ("failed", [4])
    elsewhere = tmp_path / "second"
    assert run(tmp_path, "--resume", out, "--out", elsewhere, backend="cpu").exit_code == 0
    assert steps(elsewhere) == ALL
    record_property("saves that did not fit", refused(result))
