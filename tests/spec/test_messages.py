"""Broken specs, and the whole of what people are told about each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtrain.cli import main
from xtrain.errors import SpecError
from xtrain.spec import Spec, dump_spec, load_spec
from xtrain.spec.keys import all_keys

GOOD = """\
model: {preset: gpt2-nano}
data: {source: stdlib}
batch: {global: 16, micro: 8}
train: {steps: 200}
optimizer: {lr: 3e-4}
"""

# (what is replaced, by what, the lines below "spec.yaml has N problems")
BROKEN_VALUES = [
    ("steps: 200", "steps: many", ["4:16: train.steps: found 'many', expected a whole number >= 1"]),
    ("steps: 200", "steps: 20.5", ["4:16: train.steps: found 20.5, expected a whole number >= 1"]),
    ("steps: 200", "steps: 2e2", ["4:16: train.steps: found 200.0, expected a whole number >= 1; write 200"]),
    ("steps: 200", "steps: true", ["4:16: train.steps: found true, expected a whole number >= 1"]),
    ("steps: 200", "steps: 0", ["4:16: train.steps: found 0, expected a whole number >= 1"]),
    ("steps: 200", "steps:", ["4:15: train.steps: found null, expected a whole number >= 1"]),
    ("3e-4", "'3e-4'", ["5:17: optimizer.lr: found '3e-4', expected a number > 0; remove the quotes"]),
    ("3e-4", "fast", ["5:17: optimizer.lr: found 'fast', expected a number > 0"]),
    ("3e-4", "true", ["5:17: optimizer.lr: found true, expected a number > 0"]),
    ("3e-4", ".nan", ["5:17: optimizer.lr: found .nan, expected a finite number"]),
    (
        "3e-4",
        "1, betas: [0.9, 2]",
        ["5:27: optimizer.betas: found [0.9, 2], expected a list of 2 numbers >= 0 and < 1"],
    ),
    (
        "3e-4",
        "1, betas: [0.9]",
        ["5:27: optimizer.betas: found [0.9], expected a list of 2 numbers >= 0 and < 1"],
    ),
    (
        "200",
        "200, seed: 9223372036854775808",
        [
            "4:27: train.seed: found 9223372036854775808, expected a whole number >= 0; keep it below 2^63",
        ],
    ),
    ("micro: 8", "micro: 1e3", ["3:28: batch.micro: found 1000.0, expected a whole number >= 1; write 1000"]),
    ("200", "200, clip: 0", ["4:27: train.clip: found 0, expected a number > 0 or null"]),
    ("200", "200, compile: yes", ["4:30: train.compile: found 'yes', expected true or false; write true"]),
    (
        "200",
        "200, compile: 'true'",
        ["4:30: train.compile: found 'true', expected true or false; remove the quotes"],
    ),
    (
        "gpt2-nano",
        "gpt2-nan",
        [
            "1:17: model.preset: found 'gpt2-nan', expected gpt2-nano, gpt2, gpt2-medium, gpt2-large or "
            "gpt2-xl; did you mean 'gpt2-nano'?"
        ],
    ),
    ("stdlib", "stdlib, path: 3", ["2:30: data.path: found 3, expected text or a list of texts"]),
    ("{steps: 200}", "[1]", ["4:8: train: found [1], expected a section with steps"]),
    ("{lr: 3e-4}", "adamw", ["5:1: optimizer.lr: missing, expected a number > 0"]),
    ("{lr: 3e-4}", "adam", ["5:12: optimizer: found 'adam', expected adamw or sgd; did you mean 'adamw'?"]),
    (
        "lr: 3e-4",
        "name: adam, lr: 1",
        ["5:19: optimizer.name: found 'adam', expected adamw or sgd; did you mean 'adamw'?"],
    ),
]

BROKEN_KEYS = [
    ("train:", "trian:", ["4:1: trian: unknown key; did you mean 'train'?"]),
    ("steps: 200", "stpes: 200", ["4:9: train.stpes: unknown key; did you mean 'steps'?"]),
    ("train: {steps: 200}\n", "", ["train: missing, expected a section with steps"]),
    ("steps: 200", "", ["4:1: train.steps: missing, expected a whole number >= 1"]),
    ("200", "200, lr: 3", ["4:21: train.lr: unknown key; did you mean 'optimizer.lr'?"]),
    ("200", "200, batch_size: 3", ["4:21: train.batch_size: unknown key; did you mean 'batch.micro'?"]),
    ("micro: 8", "zzz: 1", ["3:21: batch.zzz: unknown key; known here: global, micro"]),
    ("micro: 8", "global_: 8", ["3:21: batch.global_: unknown key; did you mean 'global'?"]),
    (
        "micro: 8",
        "gradient_accumulation: 2",
        [
            "3:21: batch.gradient_accumulation: unknown key; it follows from batch.global, batch.micro and "
            "the number of processes"
        ],
    ),
    (
        "3e-4",
        "1, name: sgd, eps: 1",
        ["5:31: optimizer.eps: unknown key; it belongs to optimizer adamw"],
    ),
    ("200", "200, steps: 300", ["4:21: train.steps: given twice, in line 4; keep one"]),
    ("200", "200, 3: 4", ["4:21: train: found 3 as a key, expected a word"]),
    (
        "steps: 200",
        "steps: 200, <<: {seed: 3}",
        ["4:21: train: found the merge key <<, expected plain keys; write the keys out"],
    ),
    ("200", "!!int '5'", ["4:16: train.steps: found tag !!int '5', expected plain YAML; remove the tag"]),
    ("{steps: 200}", "! {steps: 200}", ["4:8: train: found tag !, expected plain YAML; remove the tag"]),
    (
        "200",
        "200, !!str seed: 3",
        ["4:21: train: found tag !!str, expected plain YAML; remove the tag"],
    ),
    (
        "200",
        "!!python/object:os.system 3",
        ["4:16: train.steps: found tag !!python/object:os.system '3', expected plain YAML; remove the tag"],
    ),
]

SHARDINGS = "expected none, optimizer, gradients or parameters; did you mean "
# (line 6 of the spec, the lines below the head)
BROKEN_SECTIONS = [
    ("train: {steps: 4}", ["6:1: train: given twice, in lines 4 and 6; keep one"]),
    (
        "schedule: cosin",
        [
            "6:11: schedule: found 'cosin', expected constant, linear, cosine, wsd or warmup-decay; "
            "did you mean 'cosine'?"
        ],
    ),
    (
        "schedule: {name: wsd}",
        [
            "6:1: schedule.decay: missing, expected a whole number >= 1",
            "6:1: schedule.stable: missing, expected a whole number >= 0",
        ],
    ),
    ("schedule: {stable: 3}", ["6:12: schedule.stable: unknown key; it belongs to schedule wsd"]),
    (
        "schedule: {name: linear, cycles: 1}",
        ["6:26: schedule.cycles: unknown key; it belongs to schedule cosine"],
    ),
    (
        "precision: {dtype: fp8}",
        ["6:20: precision.dtype: found 'fp8', expected fp32, bf16 or fp16"],
    ),
    (
        "memory: fast",
        [
            "6:9: memory: found 'fast', expected auto or a section with checkpointing, sharding, offload, "
            "optimizer_in_backward, loss_chunk"
        ],
    ),
    (
        "memory: {sharding: ~}",
        [
            f"6:20: memory.sharding: found null, {SHARDINGS}'none'?",
        ],
    ),
    ("memory: {sharding: zero2}", [f"6:20: memory.sharding: found 'zero2', {SHARDINGS}'gradients'?"]),
    ("memory: {sharding: ZeRO-3}", [f"6:20: memory.sharding: found 'ZeRO-3', {SHARDINGS}'parameters'?"]),
    ("memory: {sharding: 1}", [f"6:20: memory.sharding: found 1, {SHARDINGS}'optimizer'?"]),
    (
        "memory: {chekpointing: none, offload: {optimizer: disk}}",
        [
            "6:10: memory.chekpointing: unknown key; did you mean 'checkpointing'?",
            "6:51: memory.offload.optimizer: found 'disk', expected none, cpu, nvme or a section with "
            "device, path",
        ],
    ),
    (
        "memory: {checkpointing: off}",
        [
            "6:25: memory.checkpointing: found 'off', expected none, auto or a section with auto, every, "
            "number, selective; did you mean 'none'?"
        ],
    ),
    (
        "memory: {loss_chunk: 0}",
        ["6:22: memory.loss_chunk: found 0, expected auto, none or a whole number >= 1"],
    ),
    (
        "manual: {split: [1, many]}",
        [
            '6:17: manual.split: found [1, "many"], expected auto, a list of whole numbers >= 1 or a list of '
            "numbers >= 0 and < 1"
        ],
    ),
    (
        "log: {trackers: [mlflow]}",
        ['6:17: log.trackers: found ["mlflow"], expected a list of tensorboard or wandb'],
    ),
    ("log:", ["6:5: log: found null, expected a section with every_steps, trackers; leave it out"]),
    (
        "launch: {processes: ~}",
        ["6:21: launch.processes: found null, expected a whole number >= 1; leave it out"],
    ),
    ("deepspeed: 3", ["6:12: deepspeed: found 3, expected a mapping"]),
    ("learning_rate: 3", ["6:1: learning_rate: unknown key; did you mean 'optimizer.lr'?"]),
    ("---\na: 1", ["6:1: a second document starts here; keep one spec in a file, without `---` lines"]),
    ("\tlog: {}", ["6:1: a tab, where YAML allows only spaces; indent with spaces"]),
    ("log: *later", ["6:6: not valid YAML: found undefined alias 'later'"]),
    ("log: a: b", ["6:7: not valid YAML: mapping values are not allowed here"]),
    (
        "checkpoint: {every_steps: 0, keep: -1, best: 1}",
        [
            "6:27: checkpoint.every_steps: found 0, expected a whole number >= 1",
            "6:36: checkpoint.keep: found -1, expected a whole number >= 1",
            "6:46: checkpoint.best: found 1, expected true or false",
        ],
    ),
]

BROKEN_FILES = [
    (b"", "the file is empty; start from one of configs/"),
    (b"# nothing yet\n", "the file is empty; start from one of configs/"),
    (b"- 1\n", "1:1: found a list, expected keys such as `model:` at the top level"),
    (b"just words\n", "1:1: found 'just words', expected keys such as `model:` at the top level"),
    (b"\xff\xfea", "byte 1 is not UTF-8; save the file as UTF-8 text"),
    (b"a: \x00", "a character that no text has, at position 4; save the file as UTF-8 text"),
    (b"#" * (1 << 20) + b"\n", "larger than 1 MiB, which no spec is; is this the right file?"),
    (b"a: &a [*a]\n", "1:4: this value refers to itself; write it out"),
]


@pytest.fixture(autouse=True)
def inside_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def told(*words: str) -> str:
    """Standard error of `xtrain check spec.yaml WORDS`, which must refuse it."""
    result = CliRunner().invoke(main, ["check", "spec.yaml", *words])
    assert (result.exit_code, result.stdout) == (2, "")
    return result.stderr


def message(*lines: str) -> str:
    head = f"error: spec.yaml has {len(lines)} problem{'s' if len(lines) > 1 else ''}"
    return "\n  ".join([head, *lines]) + "\n"


@pytest.mark.parametrize(("old", "new", "lines"), BROKEN_VALUES + BROKEN_KEYS)
def test_broken_key_or_value_is_told_with_its_place(old: str, new: str, lines: list[str]) -> None:
    assert GOOD.count(old) == 1
    Path("spec.yaml").write_text(GOOD.replace(old, new))
    assert told() == message(*lines)


@pytest.mark.parametrize(("added", "lines"), BROKEN_SECTIONS)
def test_broken_section_is_told_with_its_place(added: str, lines: list[str]) -> None:
    Path("spec.yaml").write_text(f"{GOOD}{added}\n")
    assert told() == message(*lines)


@pytest.mark.parametrize(("content", "line"), BROKEN_FILES, ids=[line[:30] for _, line in BROKEN_FILES])
def test_broken_file_is_told_in_one_line(content: bytes, line: str) -> None:
    Path("spec.yaml").write_bytes(content)
    assert told() == message(line)


def test_missing_file_names_the_one_that_was_meant() -> None:
    Path("spce.yaml").write_text(GOOD)
    assert told() == message("no such file; did you mean spce.yaml?")


def test_link_that_leads_nowhere_is_not_what_was_meant() -> None:
    Path("spec.yaml").symlink_to("elsewhere.yaml")
    assert told() == message("no such file")


def test_pipe_is_refused_for_a_spec_is_read_more_than_once() -> None:
    os.mkfifo("spec.yaml")
    assert told() == message("a pipe or device, not a file; save it as a file: it is read again later")


def test_folder_is_not_a_spec() -> None:
    Path("spec.yaml").mkdir()
    assert told() == message("a folder, not a file; name a YAML file in it")


def test_problems_of_every_kind_are_told_at_once_in_the_order_of_the_file() -> None:
    Path("spec.yaml").write_text(
        GOOD.replace("3e-4", "fast").replace("stdlib", "stdlib, source: text").replace("micro: 8", "mikro: 8")
    )
    assert told("--set", "train.steps=0") == message(
        "2:24: data.source: given twice, in line 2; keep one",
        "3:21: batch.mikro: unknown key; did you mean 'micro'?",
        "5:17: optimizer.lr: found 'fast', expected a number > 0",
        "--set train.steps=0: train.steps: found 0, expected a whole number >= 1",
    )


def test_bad_value_does_not_silence_the_checks_across_other_sections() -> None:
    Path("spec.yaml").write_text(
        GOOD.replace("3e-4", "fast").replace("micro: 8", "micro: 5, zzz: 1") + "schedule: {warmup: 300}\n"
    )
    assert told() == message(
        "3:17: batch.global: found 16, expected a multiple of micro (5) x processes (1) = 5; nearest: "
        "global 15 or 20, or micro 4 or 8",
        "3:31: batch.zzz: unknown key; known here: global, micro",
        "5:17: optimizer.lr: found 'fast', expected a number > 0",
        "6:20: schedule.warmup: found 300, expected less than train.steps (200); nearest: 199, "
        "or train.steps 301",
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("200", "200, seed: many"),  # so that train.steps may be meant otherwise, too
        ("200", "200, steps: 400"),
        ("train: {steps: 200}", "trian: {steps: 400}"),
        ("200", "200, step: 400"),
        ("train: {steps: 200}", "max_steps: 400"),
    ],
)
def test_nothing_is_said_across_a_section_that_is_in_doubt(old: str, new: str) -> None:
    Path("spec.yaml").write_text(GOOD.replace(old, new) + "schedule: {warmup: 300}\n")
    assert "schedule.warmup" not in told()


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, -1, 3, 2.5, 1e300, 2**70, "auto", "x", [], [1, "a"], {}, {"a": {}}]
)
DOTTED = [*all_keys(), "zzz", "train.zzz", "trian", "optimizer.name.x", "memory.checkpointing.zzz"]


@given(st.dictionaries(st.sampled_from(DOTTED), VALUES, max_size=6))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_wrong_is_told_and_breaks_nothing(changes: dict[str, Any]) -> None:
    Path("spec.yaml").write_text(GOOD)
    found = read_or_refused([f"{key}={json.dumps(value)}" for key, value in changes.items()])
    if isinstance(found, Spec):
        assert Spec.model_validate(dump_spec(found)) == found
    else:
        assert found.problems
        assert all(problem.expected for problem in found.problems)


def read_or_refused(overrides: list[str]) -> Spec | SpecError:
    try:
        return load_spec(Path("spec.yaml"), overrides)
    except SpecError as error:
        return error


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["batch.micro=3"],
            "--set batch.micro=3: batch.global: found 16, expected a multiple of micro (3) x processes (1) = "
            "3; nearest: global 15 or 18, or micro 2 or 4",
        ),
        (
            ["train.seed=1", "launch.processes=2", "batch.micro=3"],
            "--set launch.processes=2 --set batch.micro=3: batch.global: found 16, expected a multiple of "
            "micro (3) x processes (2) = 6; nearest: global 12 or 18, or micro 2 or 4",
        ),
        (
            ["model.hf=gpt2"],
            "--set model.hf=gpt2: model: found preset and hf, expected exactly one of preset, factory, hf; "
            "keep preset",
        ),
    ],
)
def test_problem_that_an_override_causes_elsewhere_names_it(overrides: list[str], line: str) -> None:
    Path("spec.yaml").write_text(GOOD)
    assert told(*(word for one in overrides for word in ("--set", one))) == message(line)


def test_override_is_not_blamed_for_what_the_file_says() -> None:
    Path("spec.yaml").write_text(GOOD + "schedule: {warmup: 300}\n")
    assert told("--set", "train.seed=1").startswith(
        "error: spec.yaml has 1 problem\n  6:20: schedule.warmup:"
    )


@pytest.mark.parametrize("text", ["deepspeed: {a: {b: [.inf]}}", "deepspeed: {a: {b: [.nan]}}"])
def test_number_that_json_does_not_know_never_reaches_a_ds_config(text: str) -> None:
    number = text.partition("[")[2].partition("]")[0]
    Path("spec.yaml").write_text(f"{GOOD}{text}\n")
    assert told() == message(f"6:21: deepspeed.a.b.0: found {number}, expected a finite number")
    Path("spec.yaml").write_text(GOOD)
    line = f"--set deepspeed.x={number}: deepspeed.x: found {number}, expected a finite number"
    assert told("--set", f"deepspeed.x={number}") == message(line)


@pytest.mark.parametrize(
    ("added", "lines"),
    [
        ('"a\\e[31mb": 1', ["6:1: found a\\x1b[31mb as a key, expected a word"]),
        (
            'log: {trackers: ["\\e]0;x\\a"]}',
            ['6:17: log.trackers: found ["\\u001b]0;x\\u0007"], expected a list of tensorboard or wandb'],
        ),
        (
            'deepspeed: {a: "\\0"}',
            ["6:16: deepspeed.a: found '\\x00', expected text without NUL or lone surrogates"],
        ),
        (
            'deepspeed: {a: "\\ud800"}',
            ["6:16: deepspeed.a: found '\\ud800', expected text without NUL or lone surrogates"],
        ),
        (
            'memory: {offload: {optimizer: {device: cpu, path: "x\\e[2J"}}}',
            [
                "6:51: memory.offload.optimizer.path: found x\\x1b[2J, expected only with device nvme, not "
                "cpu; use device: nvme, or leave path out"
            ],
        ),
    ],
)
def test_no_control_character_reaches_the_terminal(added: str, lines: list[str]) -> None:
    Path("spec.yaml").write_text(f"{GOOD}{added}\n")
    assert told() == message(*lines)


def test_control_characters_of_the_command_line_do_not_reach_the_terminal_either() -> None:
    Path("spec.yaml").write_text(GOOD)
    line = "--set tr\\x1bain=1: tr\\x1bain: unknown key; did you mean 'train'?"
    assert told("--set", "tr\x1bain=1") == message(line)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.steps=many", "train.steps: found 'many', expected a whole number >= 1"),
        ("trian.steps=3", "trian: unknown key; did you mean 'train'?"),
        ("optimizer={name: sgd}", "optimizer.lr: missing, expected a number > 0"),
        ("train.steps.x=3", "train.steps: found 200, expected a section; set train.steps as a whole"),
        ("optimizer.lr='1'", "optimizer.lr: found '1', expected a number > 0; remove the quotes"),
        ("train.clip={a: 1, a: 2}", "train.clip.a: given twice, in line 1; keep one"),
        ("train", "expected KEY=VALUE; such as train.steps=20"),
        ("train.steps=", "expected KEY=VALUE; such as train.steps=20"),
        ("=3", "expected KEY=VALUE; such as train.steps=20"),
        (
            "train.steps=]",
            "train.steps: not valid YAML while parsing a block node: expected the node content, "
            "but found ']'",
        ),
    ],
)
def test_problem_of_an_override_names_the_override(override: str, line: str) -> None:
    Path("spec.yaml").write_text(GOOD)
    assert told("--set", override) == message(f"--set {override}: {line}")


def loaded(*overrides: str, text: str = GOOD) -> Spec:
    path = Path("spec.yaml")
    path.write_text(text)
    return load_spec(path, overrides)


def test_overrides_change_make_and_spread_out_sections() -> None:
    spec = loaded(
        "train.steps=120",
        "optimizer.betas=[0.9, 0.99]",
        "schedule=constant",
        "schedule.warmup=5",
        "precision=bf16",
        "precision.weights=bf16",
        "stability.loss_spike=3",
        "train.clip=null",
    )
    expected = {
        "model": {"preset": "gpt2-nano"},
        "data": {"source": "stdlib"},
        "batch": {"global": 16, "micro": 8},
        "train": {"steps": 120, "clip": None},
        "optimizer": {"lr": 3e-4, "betas": [0.9, 0.99]},
        "schedule": {"name": "constant", "warmup": 5},
        "precision": {"dtype": "bf16", "weights": "bf16"},
        "stability": {"loss_spike": 3},
    }
    assert spec == Spec.model_validate(expected)


def test_numbers_may_be_as_large_as_64_bits_count_and_have_their_thousands_apart() -> None:
    assert loaded("train.steps=1_000").train.steps == 1000
    assert loaded(f"train.seed={2**63 - 1}").train.seed == 2**63 - 1


def test_later_override_wins_and_is_the_one_named() -> None:
    assert loaded("train.steps=20", "train.steps=30").train.steps == 30
    with pytest.raises(SpecError) as error:
        loaded("train.steps=many", "train={steps: 0}")
    (problem,) = error.value.problems
    assert problem.origin == "--set train={steps: 0}"


FULL = """\
schedule: {name: wsd, warmup: 10, stable: 100, decay: 50}
precision: {dtype: fp16, weights: fp32}
memory: {checkpointing: {every: 2}, sharding: parameters, offload: {optimizer: cpu}, loss_chunk: 64}
stability: {loss_spike: 3}
deepspeed: {zero_optimization: {overlap_comm: true}}
"""


@pytest.mark.parametrize(
    "more", ["", FULL, "memory: auto\n", "schedule: linear\n", "memory: {checkpointing: auto}\n"]
)
def test_dumped_spec_is_read_back_the_same(more: str) -> None:
    spec = loaded(text=GOOD + more)
    dumped = dump_spec(spec)
    assert Spec.model_validate(dumped) == spec
    assert dumped["batch"] == {"global": 16, "micro": 8}
