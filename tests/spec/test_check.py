"""Problems across keys: each message whole, and the valid neighbours of each problem pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xtrain.printable import printable
from xtrain.spec.check import CHECKS, check_spec
from xtrain.spec.nearest import divisors
from xtrain.spec.tree import LARGEST, Spec

BASE: dict[str, Any] = {
    "model": {"preset": "gpt2-nano"},
    "data": {"source": "stdlib"},
    "batch": {"global": 16, "micro": 8},
    "train": {"steps": 200},
    "optimizer": {"lr": 1e-3},
}


def problems(world: int | None = None, /, **sections: Any) -> list[str]:
    """Messages for the base spec with keys of its sections set, or whole sections replaced by words."""
    tree = dict(BASE)
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return [str(problem) for problem in check_spec(Spec.model_validate(tree), world)]


def test_base_spec_has_no_problems() -> None:
    assert problems() == []


# --- model -------------------------------------------------------------------------------------

MODELS = [
    ({"preset": None}, "model: expected exactly one of preset, factory, hf; add preset: gpt2-nano"),
    (
        {"hf": "distilgpt2"},
        "model: found preset and hf, expected exactly one of preset, factory, hf; keep preset",
    ),
    (
        {"preset": None, "factory": "models.tiny:build", "layers": 3},
        "model.layers: found 3, expected only with model.preset; pass it in model.args",
    ),
    (
        {"preset": None, "hf": "distilgpt2", "heads": 3},
        "model.heads: found 3, expected only with model.preset; leave it out",
    ),
    (
        {"preset": None, "factory": "models.tiny:build", "dropout": 0.1},
        "model.dropout: found 0.1, expected only with model.preset; pass it in model.args",
    ),
    ({"args": {"a": 1}}, "model.args: found {'a': 1}, expected only with model.factory; leave it out"),
    (
        {"blocks": "h"},
        "model.blocks: found h, expected only with model.factory or model.hf: a preset's blocks are known; "
        "leave it out",
    ),
    (
        {"preset": None, "factory": "models/tiny.py:build"},
        "model.factory: found models/tiny.py:build, expected package.module:function; "
        "did you mean models.tiny:build?",
    ),
    (
        {"preset": None, "factory": "models.tiny.build"},
        "model.factory: found models.tiny.build, expected package.module:function; "
        "did you mean models.tiny:build?",
    ),
    (
        {"preset": None, "factory": "tiny"},
        "model.factory: found tiny, expected package.module:function; for example my_models.tiny:build",
    ),
    (
        {"heads": 5},
        "model.heads: found 5, expected a divisor of hidden (128); "
        "nearest: heads 4 or 8, or hidden 125 or 130",
    ),
    (
        {"heads": 3, "hidden": 2},
        "model.heads: found 3, expected a divisor of hidden (2); nearest: heads 2, or hidden 3",
    ),
    (
        {"positions": 64},
        "data.seq_len: found 128, expected at most model.positions (64); use 64, or model.positions 128",
    ),
    (
        {"vocab_size": 256},
        "model.vocab_size: found 256, expected at least the 257 symbols of data.tokenizer bytes; "
        "use 257, or leave it out",
    ),
]


@pytest.mark.parametrize(("model", "message"), MODELS, ids=str)
def test_model_that_cannot_be_is_refused(model: dict[str, Any], message: str) -> None:
    assert problems(model=model) == [message]


@pytest.mark.parametrize(
    "model",
    [
        {"layers": 2, "hidden": 96, "heads": 6, "dropout": 0.1, "vocab_size": 257},
        {"positions": 128},
        {"preset": None, "factory": "models.tiny:build", "args": {"depth": 2}, "vocab_size": 300},
        {"preset": None, "hf": "distilgpt2", "blocks": "transformer.h"},
    ],
    ids=str,
)
def test_model_that_can_be_is_accepted(model: dict[str, Any]) -> None:
    assert problems(model=model) == []


def test_missing_initial_weights_name_the_folder_that_looks_like_them(tmp_path: Path) -> None:
    (tmp_path / "step-100").mkdir()
    given = tmp_path / "step-10"
    assert problems(model={"init_from": str(given)}) == [
        f"model.init_from: found {given}, expected a folder that exists; did you mean {given}0?"
    ]
    assert problems(model={"init_from": f"{given}0"}) == []


# --- data --------------------------------------------------------------------------------------

SOURCES = [
    (
        {"source": "jsonl"},
        "data.source: found jsonl, not built yet: expected stdlib, text, tokens or synthetic; "
        "use text, with the texts in files",
    ),
    (
        {"source": "hf", "path": "wikitext"},
        "data.source: found hf, not built yet: expected stdlib, text, tokens or synthetic; "
        "use text, with the texts in files",
    ),
    (
        {"masked": 0.3},
        "data.masked: found 0.3, expected only with data.source synthetic, not stdlib; leave it out",
    ),
    (
        {"tokens": 5000},
        "data.tokens: found 5000, expected only with data.source synthetic, not stdlib; leave it out",
    ),
    (
        {"source": "synthetic", "tokenizer": "gpt2"},
        "data.tokenizer: found gpt2, expected only with a data.source of text: "
        "synthetic has no text to split; leave it out",
    ),
    (
        {"path": "corpus.txt"},
        "data.path: found corpus.txt, expected none with data.source stdlib; "
        "leave it out, or use data.source text",
    ),
    (
        {"source": "text"},
        "data.path: expected a file, a list of files or a glob: data.source text needs one; "
        "or use data.source stdlib, which needs none",
    ),
    (
        {"source": "tokens", "path": []},
        "data.path: expected a file, a list of files or a glob: data.source tokens needs one; "
        "or use data.source stdlib, which needs none",
    ),
]


@pytest.mark.parametrize(("data", "message"), SOURCES, ids=str)
def test_data_keys_that_contradict_the_source_are_refused(data: dict[str, Any], message: str) -> None:
    assert problems(data=data) == [message]


def test_synthetic_data_may_be_masked_and_have_a_length() -> None:
    assert problems(data={"source": "synthetic", "masked": 0.3, "tokens": 5000}) == []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a file of text and two of tokens."""
    for name in ("corpus.txt", "ids.npy", "more.bin"):
        (tmp_path / name).write_bytes(b"ab")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_text_files_that_exist_are_found_by_name_list_and_glob(folder: Path) -> None:
    for path in ("corpus.txt", ["corpus.txt", str(folder / "corpus.txt")], "*.txt", "**/*.txt"):
        assert problems(data={"source": "text", "path": path}) == []


def test_missing_file_names_the_one_that_looks_like_it(folder: Path) -> None:
    assert problems(data={"source": "text", "path": "copus.txt"}) == [
        "data.path: found copus.txt, expected a file that exists; did you mean corpus.txt?"
    ]


def test_every_missing_file_of_a_list_is_reported(folder: Path) -> None:
    assert problems(data={"source": "text", "path": ["corpus.txt", "zzz", "no/where"]}) == [
        f"data.path: found zzz, expected a file that exists; looked from {folder}",
        f"data.path: found no/where, expected a file that exists; looked from {folder}",
    ]


@pytest.mark.parametrize("path", ["~nobody-of-that-name/x", "x" * 5000, "a\0b"], ids=["user", "long", "nul"])
def test_what_can_be_no_path_is_a_missing_file(folder: Path, path: str) -> None:
    assert problems(data={"source": "text", "path": path}) == [
        f"data.path: found {printable(path)}, expected a file that exists; looked from {folder}"
    ]


def test_glob_that_matches_nothing_is_refused(folder: Path) -> None:
    assert problems(data={"source": "text", "path": "*.md"}) == [
        f"data.path: found *.md, expected a glob that matches a file; looked from {folder}"
    ]


def test_folder_of_texts_is_refused_with_the_glob_to_use(folder: Path) -> None:
    (folder / "texts").mkdir()
    assert problems(data={"source": "text", "path": "texts"}) == [
        "data.path: found texts, expected files, not a folder; for example texts/**/*.txt"
    ]


def test_tokens_are_one_file_of_a_known_kind(folder: Path) -> None:
    assert problems(data={"source": "tokens", "path": "ids.npy"}) == []
    assert problems(data={"source": "tokens", "path": ["more.bin"]}) == []
    assert problems(data={"source": "tokens", "path": "corpus.txt"}) == [
        "data.path: found corpus.txt, expected .npy, or .bin of little-endian uint16, "
        "with data.source tokens; use data.source text for a file of text"
    ]
    assert problems(data={"source": "tokens", "path": ["ids.npy", "more.bin"]}) == [
        "data.path: found 2 files, expected one file with data.source tokens; join them, or use ids.npy"
    ]


# --- batch, schedule, evaluation ---------------------------------------------------------------

BATCHES = [
    (
        {"global": 30, "micro": 8},
        2,
        "batch.global: found 30, expected a multiple of micro (8) x processes (2) = 16; "
        "nearest: global 16 or 32, or micro 5 or 15",
    ),
    (
        {"global": 16, "micro": 8},
        3,
        "batch.global: found 16, expected a multiple of micro (8) x processes (3) = 24; nearest: global 24",
    ),
    (
        {"global": 16, "micro": 32},
        1,
        "batch.global: found 16, expected a multiple of micro (32) x processes (1) = 32; "
        "nearest: global 32, or micro 16",
    ),
    (
        {"global": 16, "micro": None},
        2,
        "batch.micro: expected with 2 processes: without it one pass takes all of global (16); add micro 8",
    ),
    (
        {"global": 16, "micro": None},
        3,
        "batch.micro: expected with 3 processes: without it one pass takes all of global (16); "
        "add micro 5 with global 15, or micro 6 with global 18",
    ),
]


@pytest.mark.parametrize(("batch", "world", "message"), BATCHES, ids=str)
def test_impossible_batch_names_the_nearest_possible_ones(
    batch: dict[str, Any], world: int, message: str
) -> None:
    assert problems(world, batch=batch) == [message]
    assert problems(batch=batch, launch={"processes": world}) == [message]


@pytest.mark.parametrize(
    ("batch", "world"),
    [
        ((16, 8), 3),
        ((24, 8), 3),
        ((32, 8), 2),
        ((30, 5), 2),
        ((30, 15), 2),
        ((16, 16), 1),
        ((32, 32), 1),
        ((16, 8), 2),
        ((15, 5), 3),
        ((18, 6), 3),
        ((16, None), 1),
    ],
    ids=str,
)
def test_batch_is_accepted_just_where_its_accumulation_exists(
    batch: tuple[int, int | None], world: int
) -> None:
    sizes = {"global": batch[0], "micro": batch[1]}
    spec = Spec.model_validate({**BASE, "batch": sizes})
    try:
        spec.accumulation(world)
    except ValueError:
        assert len(check_spec(spec, world)) == 1
    else:
        assert check_spec(spec, world) == []


def test_world_overrides_the_processes_of_the_spec() -> None:
    assert problems(launch={"processes": 3}) != []
    assert problems(2, launch={"processes": 3}) == []


def test_huge_numbers_are_answered_at_once() -> None:
    assert divisors(10**30)[:3] == [1, 2, 4]
    assert len(problems(batch={"global": LARGEST, "micro": 11})) == 1


SCHEDULES = [
    (
        {"name": "cosine", "warmup": 200},
        "schedule.warmup: found 200, expected less than train.steps (200); nearest: 199, or train.steps 201",
    ),
    (
        {"name": "constant", "warmup": 300},
        "schedule.warmup: found 300, expected less than train.steps (200); nearest: 199, or train.steps 301",
    ),
    (
        {"name": "wsd", "warmup": 50, "stable": 100, "decay": 60},
        "schedule: found warmup 50 + stable 100 + decay 60 = 210, expected at most train.steps (200); "
        "nearest: stable 90, or train.steps 210",
    ),
    (
        {"name": "wsd", "warmup": 150, "stable": 10, "decay": 100},
        "schedule: found warmup 150 + stable 10 + decay 100 = 260, expected at most train.steps (200); "
        "nearest: train.steps 260",
    ),
]


@pytest.mark.parametrize(("schedule", "message"), SCHEDULES, ids=str)
def test_schedule_longer_than_the_run_is_refused(schedule: dict[str, Any], message: str) -> None:
    assert problems(schedule=schedule) == [message]


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "cosine", "warmup": 199},
        {"name": "wsd", "warmup": 50, "stable": 90, "decay": 60},
        {"name": "wsd", "warmup": 50, "stable": 0, "decay": 60},
    ],
    ids=str,
)
def test_schedule_that_fits_the_run_is_accepted(schedule: dict[str, Any]) -> None:
    assert problems(schedule=schedule) == []


def test_evaluation_needs_held_out_data() -> None:
    assert problems(train={"eval_every": 10}) == []
    assert problems(train={"eval_every": 10}, data={"held_out": 0.0}) == [
        "train.eval_every: found 10, expected 0 where data.held_out is 0: there is nothing to evaluate on; "
        "set data.held_out, for example 0.01"
    ]


def test_best_checkpoint_needs_evaluation() -> None:
    assert problems(checkpoint={"best": True}, train={"eval_every": 20}) == []
    assert problems(checkpoint={"best": True}) == [
        "checkpoint.best: found true, expected train.eval_every above 0: "
        "the best one is that of the lowest eval_loss; set train.eval_every, for example 20"
    ]


# --- precision, stability ----------------------------------------------------------------------

PRECISIONS = [
    (
        {"dtype": "bf16", "weights": "fp16"},
        "precision: found {dtype: bf16, weights: fp16}, expected weights fp32 or like dtype; "
        "use {dtype: bf16, weights: fp32} or {dtype: fp16, weights: fp16}",
    ),
    (
        {"dtype": "fp32", "weights": "bf16"},
        "precision: found {dtype: fp32, weights: bf16}, expected weights fp32 or like dtype; "
        "use {dtype: fp32, weights: fp32} or {dtype: bf16, weights: bf16}",
    ),
    (
        {"dtype": "bf16", "loss_scale": 1024.0},
        "precision.loss_scale: found 1024.0, expected only with dtype fp16: bf16 needs no loss scale; "
        "leave it out",
    ),
    (
        {"hysteresis": 4},
        "precision.hysteresis: found 4, expected only with dtype fp16: fp32 needs no loss scale; "
        "leave it out",
    ),
    (
        {"dtype": "fp16", "loss_scale": 128.0, "initial_scale_power": 8},
        "precision.initial_scale_power: found 8, expected only with a dynamic scale, but loss_scale is 128; "
        "leave it out, or use loss_scale 0",
    ),
    (
        {"dtype": "fp16", "initial_scale_power": 4, "min_loss_scale": 20.0},
        "precision.min_loss_scale: found 20.0, expected at most the first scale, "
        "2 to the power of initial_scale_power (4); use 16, or initial_scale_power 5",
    ),
]


@pytest.mark.parametrize(("precision", "message"), PRECISIONS, ids=str)
def test_precision_that_contradicts_itself_is_refused(precision: dict[str, Any], message: str) -> None:
    assert problems(precision=precision) == [message]


@pytest.mark.parametrize(
    "precision",
    [
        "fp32",
        "bf16",
        "fp16",
        {"dtype": "bf16", "weights": "bf16"},
        {"dtype": "fp16", "weights": "fp32"},
        {"dtype": "fp16", "loss_scale": 128.0},
        {"dtype": "fp16", "initial_scale_power": 4, "min_loss_scale": 16.0, "hysteresis": 1},
    ],
    ids=str,
)
def test_every_precision_of_the_table_is_accepted(precision: Any) -> None:
    assert problems(precision=precision) == []


def test_complete_spec_read_back_has_no_new_problems() -> None:
    complete = Spec.model_validate({**BASE, "stability": {}}).model_dump(by_alias=True)
    assert check_spec(Spec.model_validate(complete)) == []


def test_window_of_losses_must_be_used_and_fill_up() -> None:
    assert problems(stability={"loss_spike": 3.0, "window": 199}) == []
    assert problems(stability={"grad_norm": 5.0}, train={"steps": 20}) == []
    assert problems(stability={"window": 50}) == [
        "stability.window: found 50, expected only with stability.loss_spike; add loss_spike, for example 3"
    ]
    assert problems(stability={"loss_spike": 3.0}, train={"steps": 20}) == [
        "stability.window: found 100, expected less than train.steps (20): "
        "loss_spike has no verdict before it is full; use 19"
    ]


# --- memory, placement -------------------------------------------------------------------------

MEMORIES = [
    (
        {"checkpointing": {"every": 2, "number": 2}},
        "memory.checkpointing: found every and number, expected one of auto, every, number, selective; "
        "keep every",
    ),
    (
        {"checkpointing": {"selective": {}}},
        "memory.checkpointing.selective: found neither, expected exactly one of ratio, ops; "
        "add ratio: 0.5, or ops: cheap",
    ),
    (
        {"checkpointing": {"selective": {"ratio": 0.5, "ops": "cheap"}}},
        "memory.checkpointing.selective: found ratio and ops, expected exactly one of ratio, ops; "
        "keep ops: cheap",
    ),
    (
        {"checkpointing": {"number": 5}},
        "memory.checkpointing.number: found 5, expected at most the 4 layers of the model; nearest: 4",
    ),
    (
        {"checkpointing": {"every": 9}},
        "memory.checkpointing.every: found 9, expected at most the 4 layers of the model; nearest: 4",
    ),
    (
        {"offload": {"optimizer": "nvme"}},
        "memory.offload.optimizer.path: expected a folder on the drive: nvme needs one; "
        "add path, or use device: cpu",
    ),
    (
        {"offload": {"gradients": {"device": "cpu", "path": "/drive"}}},
        "memory.offload.gradients.path: found /drive, expected only with device nvme, not cpu; "
        "use device: nvme, or leave path out",
    ),
    (
        {"sharding": "gradients", "offload": {"parameters": "cpu"}},
        "memory.offload.parameters: found cpu with sharding gradients, "
        "expected memory.sharding parameters: whole parameters cannot leave the device; "
        "set memory.sharding: parameters",
    ),
]


@pytest.mark.parametrize(("memory", "message"), MEMORIES, ids=str)
def test_memory_settings_that_contradict_are_refused(memory: dict[str, Any], message: str) -> None:
    assert problems(memory=memory) == [message]


@pytest.mark.parametrize(
    "memory",
    [
        "auto",
        {"checkpointing": "auto"},
        {"checkpointing": {"every": 4}},
        {"checkpointing": {"number": 4}},
        {"checkpointing": {"selective": {"ops": "cheap"}}},
        {"offload": {"optimizer": "cpu", "activations": "cpu"}},
        {"offload": {"optimizer": {"device": "nvme", "path": "/drive"}}},
        {"sharding": "parameters", "offload": {"parameters": "cpu"}},
    ],
    ids=str,
)
def test_memory_settings_that_agree_are_accepted(memory: Any) -> None:
    assert problems(memory=memory) == []


PLACEMENTS = [
    (
        {"devices": []},
        "manual.devices: found [], expected at least one device; leave it out, or use [main]",
    ),
    (
        {"devices": ["main"] * 5},
        "manual.devices: found 5 devices, expected at most one device for each of the 4 layers; "
        "use 4 devices, or model.layers 5",
    ),
    (
        {"split": [3, 1]},
        "manual.split: found [3, 1], expected only with manual.devices; "
        "name 2 devices there, or use split: auto",
    ),
    (
        {"devices": ["main", "cpu"], "split": [2, 1, 1]},
        "manual.split: found 3 entries, expected 2 entries, one for each of manual.devices; "
        "add or remove some, or use split: auto",
    ),
    (
        {"devices": ["main", "cpu"], "split": [6, 2]},
        "manual.split: found [6, 2], which sum to 8, expected counts that sum to the 4 layers of the model; "
        "nearest: [3, 1]",
    ),
    (
        {"devices": ["main", "cpu", "main"], "split": [1, 98, 1]},
        "manual.split: found [1, 98, 1], which sum to 100, "
        "expected counts that sum to the 4 layers of the model; nearest: [1, 2, 1]",
    ),
    (
        {"devices": ["main", "cpu"], "split": [0.3, 0.3]},
        "manual.split: found [0.3, 0.3], which sum to 0.6, expected shares that sum to 1; "
        "nearest: [0.5, 0.5]",
    ),
]


@pytest.mark.parametrize(("manual", "message"), PLACEMENTS, ids=str)
def test_split_that_does_not_fit_devices_or_layers_is_refused(manual: dict[str, Any], message: str) -> None:
    assert problems(manual=manual) == [message]


@pytest.mark.parametrize(
    "manual",
    [
        {},
        {"devices": ["main", "cpu"]},
        {"devices": ["main", "cpu"], "split": [3, 1]},
        {"devices": ["main", "cpu", "main"], "split": [1, 2, 1]},
        {"devices": ["main", "cpu", "main"], "split": [0.3333, 0.3333, 0.3333]},
    ],
    ids=str,
)
def test_split_that_fits_is_accepted(manual: dict[str, Any]) -> None:
    assert problems(manual=manual) == []


# --- all together ------------------------------------------------------------------------------


def test_every_problem_is_reported_at_once() -> None:
    found = problems(
        3,
        model={"heads": 5},
        data={"masked": 0.5},
        schedule={"name": "linear", "warmup": 500},
        precision={"dtype": "bf16", "weights": "fp16"},
        memory={"checkpointing": {"every": 2, "number": 2}},
    )
    assert [message.split(":")[0] for message in found] == [
        "model.heads",
        "data.masked",
        "batch.global",
        "schedule.warmup",
        "precision",
        "memory.checkpointing",
    ]


def test_chunk_of_the_loss_is_refused_where_the_model_makes_its_logits_itself() -> None:
    model = {"preset": None, "factory": "models.tiny:build"}
    assert problems(model=model, memory={"loss_chunk": "none"}) == []
    assert problems(memory={"loss_chunk": 64}) == []
    assert problems(model=model, memory={"loss_chunk": 64}) == [
        "memory.loss_chunk: found 64, expected only with model.preset or model.hf: this model makes its "
        "logits as a whole; leave it out"
    ]


def test_every_section_but_those_of_one_backend_and_the_log_is_read_by_a_check() -> None:
    read = frozenset().union(*(reads for _, reads in CHECKS))
    assert read >= {"model", "data", "batch", "train", "schedule", "precision", "memory", "launch"}
    assert read <= {*Spec.model_fields}


def test_checks_of_an_unsound_section_are_left_out_and_the_others_are_not() -> None:
    spec = Spec.model_validate(
        {**BASE, "batch": {"global": 10, "micro": 4}, "schedule": {"warmup": 500}, "launch": {"processes": 3}}
    )
    told = {section: [p.path for p in check_spec(spec, None, {section})] for section in ("launch", "train")}
    assert told == {"launch": ["schedule.warmup"], "train": ["batch.global"]}


@pytest.mark.slow
def test_checking_imports_no_heavy_library() -> None:
    program = (
        "import sys; from xtrain.spec.tree import Spec; from xtrain.spec.check import check_spec; "
        f"assert check_spec(Spec.model_validate({BASE!r})) == []; "
        "print(*sorted({'torch', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
