"""Predicted bytes against those the ledger counts on a real step; and `xtrain plan SPEC`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks.plan_accuracy import Outcome, outcomes
from benchmarks.plan_cases import BF16_WEIGHTS, Case, cases
from benchmarks.plan_measure import measure
from tests.small_runs import SPEC
from xtrain.cli import main
from xtrain.contract import MEMORY_CATEGORIES
from xtrain.plan.ladder import USABLE
from xtrain.plan.layout import DEVICE, peaks
from xtrain.plan.places import Places
from xtrain.plan.step import preset_step

TOTAL_ERROR = 0.02
CATEGORY_ERROR = 0.05
"""Of the total: small categories are rounding."""

SHAPES = [
    Case(),
    Case(accumulation=1, precision="bf16"),
    Case(precision=BF16_WEIGHTS, layers=2, hidden=256, heads=8),
    Case(vocab_size=4000, loss_chunk="none", precision="bf16"),
    Case(vocab_size=4000, loss_chunk=64),
    Case(layers=2, vocab_size=50_257, micro=1),
    Case(dropout=0.1),
    Case(dropout=0.1, precision="bf16", seq_len=256, micro=2),
    Case(dropout=0.1, layers=6, checkpointing={"every": 1}, precision=BF16_WEIGHTS),
]
RECOMPUTED = [
    Case(layers=6, checkpointing={"every": 1}),
    Case(layers=6, checkpointing={"every": 3}, precision="bf16"),
    Case(layers=6, checkpointing={"selective": {"ratio": 0.5}}),
    Case(layers=6, checkpointing={"selective": {"ops": "cheap"}}, precision="bf16"),
    Case(layers=6, checkpointing="auto", precision=BF16_WEIGHTS),
    Case(layers=2, checkpointing={"selective": {"ops": "cheap"}}, vocab_size=64),
]
AT_ONCE = [
    Case(layers=6, accumulation=1, micro=1, checkpointing={"every": 1}, precision=precision, in_backward=True)
    for precision in ("fp32", "bf16", BF16_WEIGHTS)
]
"""Where a set of gradients would be the peak."""


def compared(case: Case) -> list[Outcome]:
    return list(outcomes(case, measure(case)))


@pytest.mark.parametrize("case", SHAPES + RECOMPUTED + AT_ONCE, ids=str)
def test_the_peak_is_predicted_by_category(case: Case) -> None:
    (found,) = compared(case)
    assert abs(found.error) <= TOTAL_ERROR
    for category in MEMORY_CATEGORIES:
        assert abs(found.difference(category)) <= CATEGORY_ERROR * found.total, category


def test_the_benchmark_sweeps_at_least_40_cases() -> None:
    assert len(list(cases())) >= 40


def test_a_step_without_techniques_is_the_highest_of_the_ladder() -> None:
    plain, *others = (
        peaks(preset_step(case.spec(), 2), Places())[DEVICE].total
        for case in (Case(layers=6), *RECOMPUTED[:3])
    )
    assert max(others) < plain


def plan(path: Path, *words: str) -> Result:
    return CliRunner().invoke(main, ["plan", str(path), *words], catch_exceptions=False)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC)
    return path


WIDE = ("--set=batch.global=64", "--set=batch.micro=1", "--set=data.seq_len=128", "--set=model.hidden=64")


def test_the_first_rung_that_fits_is_marked(spec: Path) -> None:
    told = json.loads(
        plan(
            spec,
            "--json",
            *WIDE,
        ).stdout
    )
    totals = [rung["total_bytes"] for rung in told["ladder"]]
    assert totals == sorted(totals, reverse=True)
    between = (totals[1] + totals[2]) / 2 / USABLE / 2**20
    shown = plan(
        spec,
        *WIDE,
        "--device-memory",
        f"{between:.6f}MiB",
    ).stdout
    rows = [line for line in shown.splitlines() if line.startswith(("plain fp32", "+ "))]
    verdicts = ["does not fit" in row for row in rows]
    assert verdicts[:2] == [True, True]
    assert "fits: the first" in rows[2]
    assert [rung["first_fit"] for rung in told["ladder"]].count(True) == 0
    memory = ("--device-memory", f"{between:.6f}MiB", "--json")
    marked = json.loads(plan(spec, *WIDE, *memory).stdout)["ladder"]
    assert [rung["first_fit"] for rung in marked][:4] == [False, False, True, False]


def test_the_largest_micro_batch_is_the_last_divisor_that_fits(spec: Path) -> None:
    words = ["--set=batch.global=8", "--set=batch.micro=1"]
    totals = {}
    for micro in (1, 2, 4, 8):
        told = json.loads(plan(spec, "--json", "--set=batch.global=8", f"--set=batch.micro={micro}").stdout)
        totals[micro] = sum(told["peak_bytes"].values())
    memory = f"{(totals[4] + 1) / USABLE / 2**20:.9f}MiB"
    assert json.loads(plan(spec, *words, "--device-memory", memory, "--json").stdout)["largest_micro"] == 4
    assert "Largest batch.micro that fits: none" in plan(spec, *words, "--device-memory", "0.1MB").stdout


def test_several_passes_are_not_offered_where_each_pass_updates(spec: Path) -> None:
    words = ["--set=batch={global: 8}", "--set=data.seq_len=128", "--set=train.clip=null"]
    one_pass = json.loads(plan(spec, "--json", *words).stdout)
    memory = f"--device-memory={sum(one_pass['peak_bytes'].values()) * 0.7 / USABLE / 2**20:.9f}MiB"
    at_once = "--set=memory.optimizer_in_backward=true"
    assert json.loads(plan(spec, "--json", *words, memory).stdout)["largest_micro"] > 0
    assert json.loads(plan(spec, "--json", *words, memory, at_once).stdout)["largest_micro"] == 0


LARGE = ("--set=batch.micro=1", "--set=model.hidden=512", "--set=model.layers=8", "--set=model.heads=8")


def test_the_vocabulary_is_that_of_the_data(tmp_path: Path) -> None:
    """As in a run: gpt2-nano takes its tokenizer's where the spec names none."""
    np.save(tmp_path / "tokens.npy", np.arange(5000, dtype=np.int32))
    spec = tmp_path / "spec.yaml"
    spec.write_text(SPEC.replace("source: synthetic", f"source: tokens, path: '{tmp_path}/tokens.npy'"))
    words = ("--set=data.tokens=null", "--json")
    few, many = (
        json.loads(plan(spec, *words, *more).stdout) for more in (["--set=model.vocab_size=5000"], [])
    )
    assert "vocabulary 5,000" in many["model"]
    assert {**few, "model": ""} == {**many, "model": ""}


def test_without_the_data_the_spec_has_to_say_its_vocabulary(tmp_path: Path) -> None:
    spec, tokens = tmp_path / "spec.yaml", tmp_path / "tokens.npy"
    tokens.write_text("on another machine")
    spec.write_text(SPEC.replace("source: synthetic", f"source: tokens, path: '{tokens}'"))
    told = plan(spec, "--set=data.tokens=null")
    assert told.exit_code == 2
    assert "To plan without the data, set model.vocab_size" in told.stderr
    assert plan(spec, "--set=data.tokens=null", "--set=model.vocab_size=5000").exit_code == 0


def test_memory_auto_is_answered_with_what_it_would_try(spec: Path) -> None:
    words = ("--set=memory=auto", "--set=batch={global: 4, micro: 4}", "--set=data.seq_len=512")
    told = json.loads(plan(spec, *words, "--json").stdout)["memory_auto"]
    assert [rung["name"] for rung in told][:3] == ["the spec as it is", "batch.micro 2", "batch.micro 1"]
    assert any("offload" in rung["name"] for rung in told)
    second = told[1]["total_bytes"]
    room = f"{second / USABLE / 2**20 + 0.001:.6f}MiB"
    shown = plan(spec, *words, "--device-memory", room).stdout
    assert "begins with the first that takes at most 90% of its device" in shown
    (row,) = (line for line in shown.splitlines() if line.startswith("batch.micro 2"))
    assert row.endswith("fits: the first")
    assert json.loads(plan(spec, "--json").stdout)["memory_auto"] == []


@pytest.mark.parametrize(
    ("word", "note"),
    [
        ("--set=train.compile=true", "train.compile is not predicted"),
        ("--set=model.dropout=0.1", "Dropout: on a device a byte is counted for each element"),
    ],
)
def test_what_is_counted_in_part_is_said(spec: Path, word: str, note: str) -> None:
    assert note in plan(spec, word).stdout
    (told,) = json.loads(plan(spec, word, "--json").stdout)["notes"]
    assert note in told
    assert json.loads(plan(spec, "--json").stdout)["notes"] == []


def test_allocator_slack_is_null_with_its_reason(spec: Path) -> None:
    told = json.loads(plan(spec, "--json").stdout)
    assert told["allocator_slack_bytes"] is None
    assert "a run measures it" in told["allocator_slack_reason"]


def test_each_stage_of_sharding_needs_less(spec: Path) -> None:
    told = json.loads(plan(spec, *LARGE, "--gpus", "2", "--json").stdout)
    totals = {rung["name"]: rung["total_bytes"] for rung in told["sharding"]}
    assert list(totals) == ["none", "optimizer", "gradients", "parameters"]
    assert totals["none"] > totals["gradients"] > totals["parameters"]


def test_what_is_sent_grows_with_accumulation_where_micro_batches_are_reduced_one_by_one(spec: Path) -> None:
    once, twice = (
        json.loads(plan(spec, "--gpus", "2", "--json", f"--set=batch={{global: 4, micro: {micro}}}").stdout)
        for micro in (2, 1)
    )
    assert [once["accumulation"], twice["accumulation"]] == [1, 2]
    sent = {stage: (once["sent_bytes"][stage], twice["sent_bytes"][stage]) for stage in once["sent_bytes"]}
    half = once["sent_bytes"]["none"] // 2  # an all-reduce is two passes round the ring
    assert sent["none"] == (2 * half, 2 * half)
    assert sent["optimizer"] == (3 * half, 3 * half)
    assert sent["gradients"] == (3 * half, 5 * half)
    assert sent["parameters"][1] > 1.9 * sent["parameters"][0]


def test_a_stage_counts_its_buckets(spec: Path) -> None:
    """Two of 4M fp32 numbers, which are more than a small model is worth: a stage that does not pay."""
    told = json.loads(plan(spec, "--gpus", "2", "--json").stdout)
    found = {rung["name"]: rung["peak_bytes"]["other"] for rung in told["sharding"]}
    assert found["optimizer"] - found["none"] >= 2 * 4 * 2**22 - told["peak_bytes"]["parameters"]


def test_hosts_and_gpus_make_the_world(spec: Path) -> None:
    words = ("--set=batch.micro=1", "--json", "--set=batch.global=8")
    one = json.loads(plan(spec, *words, "--gpus", "4", "--nodes", "2").stdout)
    other = json.loads(plan(spec, *words, "--gpus", "8").stdout)
    assert one == other
    assert one["accumulation"] == 1


def test_without_gpus_the_spec_says_how_many_processes_there_are(spec: Path) -> None:
    words = ("--set=batch.micro=1", "--json")
    said = json.loads(plan(spec, *words, "--set=launch.processes=2").stdout)
    assert said == json.loads(plan(spec, *words, "--gpus", "2").stdout)


def test_offload_is_planned_by_place(spec: Path) -> None:
    offloaded = "--set=memory.offload={optimizer: cpu, gradients: cpu}"
    plain, moved = (json.loads(plan(spec, "--json", *words).stdout) for words in ((), (offloaded,)))
    assert set(plain["places"]) == {"device"}
    assert moved["places"]["cpu"]["optimizer"] == plain["peak_bytes"]["optimizer"]
    assert moved["places"]["device"]["optimizer"] == 0
    assert moved["places"]["device"]["gradients"] < plain["peak_bytes"]["gradients"]


def test_layers_over_devices_are_planned_by_place(spec: Path) -> None:
    halves = ("--set=model.layers=4", "--set=manual={devices: [main, cpu], split: [1, 3]}")
    places = json.loads(plan(spec, "--json", *halves).stdout)["places"]
    assert places["cpu"]["parameters"] == 3 * 4 * (12 * 32**2 + 13 * 32)
    assert "device" in places


def test_where_the_backend_computes_on_the_host_offload_moves_nothing(spec: Path) -> None:
    offloaded = "--set=memory.offload={optimizer: cpu}"
    told = json.loads(plan(spec, "--json", "--backend", "cpu", offloaded).stdout)
    assert set(told["places"]) == {"cpu"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backend", "null"), "--backend: found null, expected one of cpu, cuda, deepspeed, mps"),
        (("--backend", "cpu", "--gpus", "2"), "backend cpu is always one process"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_can(
    spec: Path, words: tuple[str, ...], message: str
) -> None:
    result = plan(spec, "--set=batch.micro=1", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_planning_a_preset_imports_no_torch(spec: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom xtrain.cli import main\n"
        f"for more in ([], ['--gpus', '2'], ['--backend', 'cpu'], ['--set', 'memory=auto']):\n"
        f"    assert CliRunner().invoke(main, ['plan', {str(spec)!r}, *more]).exit_code == 0\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_deepspeed_s_activations_are_on_the_host_where_they_are_offloaded(spec: Path) -> None:
    words = ("--backend", "deepspeed", "--gpus", "2", "--set=batch.global=16", "--set=data.seq_len=512")
    kept, parked = (
        json.loads(plan(spec, *words, *more, "--json").stdout)["places"]
        for more in ([], ["--set=memory.offload.activations=cpu"])
    )
    assert parked["device"]["activations"] < 0.1 * kept["device"]["activations"]
    assert parked["cpu"]["activations"] > 0.8 * kept["device"]["activations"]
    assert "cpu" not in kept
