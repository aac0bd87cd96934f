"""A bad word on a program's command line ends it at once, with a message and without a traceback."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from benchmarks import overhead
from benchmarks.arguments import FEWEST_STEPS


def parsed(program: str, *words: str, monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr("sys.argv", [program, *words])
    module = importlib.import_module(f"benchmarks.{program}")
    return module.parse_arguments()


@pytest.mark.parametrize(
    ("program", "option", "word", "message"),
    [
        ("growth", "--steps", "0", "found 0, expected 402 or more"),
        ("growth", "--steps", "many", "invalid number value: 'many'"),
        ("planted_slowness", "--steps", "-3", f"found -3, expected {FEWEST_STEPS} or more"),
        ("planted_slowness", "--repeats", "0", "found 0, expected 1 or more"),
        ("techniques", "--repeats", "0", "found 0, expected 1 or more"),
        ("techniques", "--rounds", "0", "found 0, expected 1 or more"),
        ("techniques", "--threads", "0", "found 0, expected 1 or more"),
        ("peers", "--steps", "0", f"found 0, expected {FEWEST_STEPS} or more"),
        ("peers", "--rounds", "0", "found 0, expected 1 or more"),
        ("memory_experiment", "--limit-mib", "0", "found 0, expected 1 or more"),
        ("memory_experiment", "--backend", "nope", "invalid choice: 'nope'"),
        ("plan_accuracy", "--lane", "nope", "invalid choice: 'nope'"),
        ("plan_accuracy", "--only", "nope", "no case has 'nope' in it"),
        ("checkpoint_pause", "--saves", "0", "found 0, expected 1 or more"),
        ("checkpoint_pause", "--lanes", "cpu,nope", "found 'nope', expected some of cpu, cuda, zero0x1"),
        ("checkpoint_pause", "--page", "/no/such/page", "cannot read /no/such/page: No such file"),
        ("checkpoint_pause", "--page", __file__, "the page has no table"),
    ],
)
def test_a_bad_word_is_refused_before_anything_is_measured(
    program: str,
    option: str,
    word: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(program, option, word, monkeypatch=monkeypatch)
    assert ended.value.code == 2
    assert f"argument {option}: " in (said := capsys.readouterr().err)
    assert message in said


@pytest.mark.parametrize("engine", ["nope", "deepspeed:7", "cpu:1"])
def test_an_engine_that_there_is_not_is_refused(
    engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["overhead", "--engines", engine])
    with pytest.raises(SystemExit) as ended:
        overhead.parse_arguments("overhead")
    assert ended.value.code == 2
    assert f"argument --engines: invalid choice: '{engine}'" in capsys.readouterr().err


PROGRAMS = [
    "checkpoint_pause",
    "growth",
    "memory_experiment",
    "peers",
    "plan_accuracy",
    "planted_slowness",
    "techniques",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_folder_for_results_is_made_before_anything_is_measured(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed(program, "--out", str(tmp_path / "new" / "folder"), monkeypatch=monkeypatch)
    assert (tmp_path / "new" / "folder").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        parsed(program, "--out", str(tmp_path / "file"), monkeypatch=monkeypatch)
    assert ended.value.code == 2
    assert f"cannot make {tmp_path / 'file'}: File exists" in capsys.readouterr().err


def test_without_words_every_program_has_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in PROGRAMS:
        assert parsed(program, monkeypatch=monkeypatch)
    monkeypatch.setattr("sys.argv", ["overhead"])
    assert set(overhead.parse_arguments("overhead").engines) <= set(overhead.ENGINES)
