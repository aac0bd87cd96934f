"""A compiled model trains as it does uncompiled, under the same names, and is compiled once.

All but one of these take torch's `aot_eager`: the same graphs are taken from the same code and traced with
their gradients, and then run operation by operation instead of being built with a C++ compiler for a minute.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import clean_process, small_runs
from tests.techniques.test_pairs import ALONE, BF16_WEIGHTS, CLIPPED_ADAMW, described, losses, merged
from tests.whole_state import whole_state
from xtrain import registry
from xtrain.contract import Batch, Engine, Job, StepInput
from xtrain.data import open_data
from xtrain.errors import RunFailed
from xtrain.measure.trace import NullTrace
from xtrain.models.source import model_source
from xtrain.spec.check import check_spec
from xtrain.spec.tree import Spec
from xtrain.techniques import compiled

COMPILE = {"train": {"compile": True}}
IN_FP32, IN_16_BIT = 1e-5, 1e-3
HF = Path(__file__).parents[2] / "configs" / "llama-tiny"
HF_MODEL = {"model": {"preset": None, "layers": None, "hidden": None, "heads": None, "hf": str(HF)}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "COMPILER", "aot_eager")
    monkeypatch.setenv("XTRAIN_EMULATED_FP16", "1")
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def start(spec: Spec) -> Engine:
    data = open_data(spec, show_progress=False)
    backend = registry.load("cpu")
    return backend.start(backend.resolve(spec, 1), model_source(spec, data.vocab_size), Job())


def step(engine: Engine, spec: Spec, number: int) -> float:
    data = open_data(spec, show_progress=False)
    batches = data.micro_batches(number, 0, 1)
    taken = StepInput(number, batches, 0.1, data.target_tokens(number))
    (values,) = engine.fetch([engine.train_step(taken, None, NullTrace())])
    return values.loss


EVERYTHING: list[dict[str, Any]] = [
    CLIPPED_ADAMW,
    {"memory": {"checkpointing": {"every": 3}, "loss_chunk": 5, "offload": {"activations": "cpu"}}},
    {"batch": {"micro": 1}},
]
TOGETHER: list[list[dict[str, Any]]] = [
    [],
    [{"precision": "bf16"}],
    [{"precision": BF16_WEIGHTS}, {"memory": {"checkpointing": "auto"}}],
    [{"manual": {"devices": ["main", "cpu"], "split": "auto"}}, {"memory": {"loss_chunk": "none"}}],
    EVERYTHING,
]
"""Each costs a second or two: tests/techniques/test_pairs.py has all pairs, uncompiled."""


@pytest.mark.parametrize("changes", TOGETHER, ids=described)
def test_losses_are_those_of_the_uncompiled_model(quick: None, changes: Any) -> None:
    cpu = registry.load("cpu")
    spec = merged(*changes, COMPILE)
    assert cpu.problems(spec, 1) == []
    found = losses(cpu, spec)
    assert graphs() >= 1
    rounded = any("precision" in change for change in changes)
    assert found == pytest.approx(losses(cpu, merged(*changes)), rel=IN_16_BIT if rounded else IN_FP32)


ALONE_TOO: list[dict[str, Any]] = [*ALONE, {"memory": {"optimizer_in_backward": True}}]


@pytest.mark.parametrize("changes", ALONE_TOO, ids=str)
def test_every_technique_trains_the_same_compiled_or_is_refused_with_the_reason(
    quick: None, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs are taken, and run as they are: do hooks and groups get along with that?"""
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    cpu, spec = registry.load("cpu"), merged(changes, COMPILE)
    if problems := [*check_spec(spec), *cpu.problems(spec, 1)]:
        assert [problem.path for problem in problems] == ["train.compile"]
        assert "ops: cheap" in problems[0].expected
        return
    found = losses(cpu, spec)
    assert graphs() >= 1
    tolerance = IN_16_BIT if "precision" in changes else IN_FP32
    assert found == pytest.approx(losses(cpu, merged(changes)), rel=tolerance)


def test_a_model_of_the_transformers_library_has_the_same_losses(quick: None) -> None:
    cpu = registry.load("cpu")
    found = losses(cpu, merged(HF_MODEL, COMPILE))
    assert graphs() >= 1
    assert found == pytest.approx(losses(cpu, merged(HF_MODEL)), rel=IN_FP32)


def test_blocks_of_one_class_are_compiled_once(quick: None) -> None:
    def compiled_graphs(layers: int) -> int:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        spec = merged({"model": {"layers": layers}}, COMPILE)
        step(start(spec), spec, 0)
        return graphs()

    assert compiled_graphs(6) == compiled_graphs(2)


def test_after_the_first_step_nothing_is_compiled_again(quick: None) -> None:
    """Also not for a last chunk of the loss that is smaller, or for batches of an evaluation."""
    spec = merged({"batch": {"micro": 2}, "memory": {"loss_chunk": 5}}, COMPILE)
    engine = start(spec)
    step(engine, spec, 0)
    before = graphs()
    for number in range(1, 4):
        step(engine, spec, number)
    (whole, *_) = open_data(spec, show_progress=False).micro_batches(0, 0, 1)
    for rows, length in ((1, 16), (2, 16), (2, 7)):
        engine.evaluate([Batch(whole.tokens[:rows, :length], whole.targets[:rows, :length])])
    step(engine, spec, 4)
    assert graphs() == before


def test_names_and_state_are_those_of_the_uncompiled_model(quick: None) -> None:
    spec = merged(CLIPPED_ADAMW, COMPILE)
    engine, plain = start(spec), start(merged(CLIPPED_ADAMW))
    step(engine, spec, 0)
    step(plain, spec, 0)
    assert engine.state_layout() == plain.state_layout()
    states = [whole_state(each) for each in (engine, plain)]
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-7)


def test_the_first_step_says_that_it_compiles_and_the_second_says_nothing(
    quick: None, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = merged(COMPILE)
    engine = start(spec)
    step(engine, spec, 0)
    first = capsys.readouterr().err.splitlines()
    assert first[0].startswith("compiling, once: ")
    assert first[-1].startswith("compiled: the first step took ")
    step(engine, spec, 1)
    assert capsys.readouterr().err == ""


def fail_to_compile(models: list[dict[str, Any]], said: Path) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise ValueError("no such instruction")

    compiled.COMPILER = broken  # type: ignore[assignment]
    with said.open("w") as file:
        for model in models:
            spec = merged(model, COMPILE)
            with pytest.raises(RunFailed) as failed:
                step(start(spec), spec, 0)
            file.write(f"{failed.value}\n")


@pytest.mark.slow
def test_a_compiler_that_fails_ends_the_run_with_a_message(tmp_path: Path) -> None:
    """In a process of its own: after a failure torch 2.13 goes on watching Python's calls, whose arguments
    then live until they return, and tests of memory that come later see that."""
    said = tmp_path / "said"
    process = clean_process.start(fail_to_compile, [{}, HF_MODEL], said)
    process.join(60)
    lines = said.read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert re.fullmatch(r"train\.compile: torch could not compile this model: .*; use false", line)


@pytest.mark.parametrize(
    ("backend", "changes", "expected"),
    [
        ("cpu", {"memory": {"checkpointing": {"selective": {"ops": "cheap"}}}}, "ops: cheap"),
        ("deepspeed", {"memory": {"checkpointing": {"selective": {"ops": "cheap"}}}}, "ops: cheap"),
        ("deepspeed", {"memory": {"sharding": "parameters"}}, "at stage 3"),
        ("mps", {}, "Apple GPUs"),
    ],
    ids=str,
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    backend: str, changes: dict[str, Any], expected: str
) -> None:
    (problem,) = registry.load(backend).problems(merged(changes, COMPILE), 1)
    assert problem.path == "train.compile"
    assert expected in problem.expected
    assert problem.nearest
    assert registry.load(backend).problems(merged(changes), 1) == []


@pytest.mark.parametrize("backend", ["cpu", "cuda", "deepspeed"])
def test_a_missing_compiler_is_told_before_anything_starts(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (problem,) = registry.load(backend).problems(merged(COMPILE), 1)
    assert str(problem) == (
        "train.compile: found true, torch.compile builds machine code and finds no compiler "
        "(no-such-compiler; the variable CXX names another); install them, or use false"
    )


@pytest.mark.parametrize(
    ("backend", "driver", "torch_version", "is_asked_for"),
    [
        ("cuda", "/", "2.13.0", True),
        ("deepspeed", "/", "2.13.0+cu130", True),
        ("cpu", "/", "2.13.0", False),
        ("cuda", "/no/such/driver", "2.13.0", False),
        ("deepspeed", "/no/such/driver", "2.13.0", False),
        ("deepspeed", "/", "2.13.0+cpu", False),
    ],
)
def test_what_compiles_for_a_gpu_is_looked_for_where_there_is_one(
    backend: str, driver: str, torch_version: str, is_asked_for: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xtrain.backends.manual.drivers.DRIVERS", (driver,))
    monkeypatch.setattr("xtrain.backends.deepspeed.environment.GPU_FILES", (driver,))
    monkeypatch.setattr("xtrain.backends.gpu_compiler.package_version", lambda name: torch_version)
    monkeypatch.setattr("xtrain.backends.gpu_compiler.MODULE", "no_such_module")
    problems = [str(problem) for problem in registry.load(backend).problems(merged(COMPILE), 1)]
    missing = (
        "train.compile: found true, torch.compile builds machine code and finds no Python module "
        "no_such_module; install them, or use false"
    )
    assert problems == ([missing] if is_asked_for else [])


@pytest.mark.slow
def test_an_uncompiled_run_goes_on_compiled_to_machine_code_and_then_uncompiled_again(tmp_path: Path) -> None:
    """With torch's real compiler: this is where its time goes."""
    torch.compiler.reset()
    plain, mixed = tmp_path / "plain", tmp_path / "mixed"
    assert small_runs.run(tmp_path, "--out", plain, backend="cpu", log__every_steps=1).exit_code == 0
    for stop_after, compile_ in ((4, "false"), (8, "true"), (12, "false")):
        words = ["--resume" if stop_after > 4 else "--out", str(mixed)]
        ended = small_runs.run(
            tmp_path, *words, "--stop-after", stop_after, backend="cpu", train__compile=compile_
        )
        assert ended.exit_code == 0, ended.output
    found, expected = ([record.loss for record in small_runs.metrics(out)] for out in (mixed, plain))
    assert found == pytest.approx(expected, rel=1e-5)
