"""`xtrain checkpoint ls | show | verify | prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from tests.checkpoints.test_format import state
from tests.small_runs import checkpoints, run
from xtrain.cli import main


def command(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["checkpoint", *map(str, words)], catch_exceptions=False)


def as_json(*words: str | Path) -> Any:
    return json.loads(command(*words, "--json").stdout)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run directory with checkpoints after 4, 8 and 12 steps."""
    assert run(tmp_path, "--out", tmp_path / "out", backend="cpu").exit_code == 0
    return tmp_path / "out"


def flip(out: Path, step: int, file: str = "model-00001-of-00001.safetensors") -> Path:
    path = out / "checkpoints" / f"step-{step:08d}" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path


def test_ls_lists_steps_sizes_and_who_wrote_them(out: Path) -> None:
    listed = as_json("ls", out)
    assert [one["step"] for one in listed] == [4, 8, 12]
    assert {(one["backend"], one["world"], one["aside"], one["wrong"]) for one in listed} == {
        ("cpu", 1, False, "")
    }
    folder = out / "checkpoints" / "step-00000012"
    assert listed[2]["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    text = command("ls", out).stdout
    assert text.count("cpu x1") == text.count("looks whole") == 3


def test_ls_lists_those_kept_aside_and_what_is_torn(out: Path) -> None:
    run(out.parent, "--resume", out / "checkpoints" / "step-00000004", "--stop-after", 5, backend="cpu")
    (out / "checkpoints" / "step-00000005" / "state.json").unlink()
    listed = as_json("ls", out)
    assert [(one["step"], one["aside"]) for one in listed] == [(4, False), (5, False), (8, True), (12, True)]
    assert listed[1]["wrong"].endswith("step-00000005/state.json is damaged: it is missing")


def test_show_tells_what_the_newest_holds(out: Path) -> None:
    found = as_json("show", out)
    assert (found["step"], found["format_version"], found["moments"]) == (12, 2, ["exp_avg", "exp_avg_sq"])
    assert found["spec"]["train"]["steps"] == 12
    assert found["tensors"]["stem.token_embedding.weight"] == [257, 32]
    text = command("show", out, "--tensors").stdout
    assert "step         12\n" in text
    assert "  stem.token_embedding.weight  [257, 32]\n" in text
    assert as_json("show", out / "checkpoints" / "step-00000004")["step"] == 4


def test_verify_finds_a_byte_that_flipped_and_names_the_file(out: Path) -> None:
    whole = command("verify", out)
    assert (whole.exit_code, whole.stdout.count(": whole\n")) == (0, 3)
    path = flip(out, 8)
    result = command("verify", out)
    assert result.exit_code == 1
    assert result.stderr == f"{path} is damaged: its hash does not fit\n"
    assert as_json("verify", out / "checkpoints" / "step-00000008") == {
        str(path.parent): [f"{path} is damaged: its hash does not fit"]
    }


def test_verify_names_every_damaged_file(out: Path) -> None:
    wrong = [flip(out, 8, name) for name in ("model-00001-of-00001.safetensors", "state.json")]
    assert command("verify", out / "checkpoints" / "step-00000008").stderr.splitlines() == [
        f"{path} is damaged: its hash does not fit" for path in wrong
    ]


def test_verify_says_of_the_first_format_that_its_values_cannot_be_verified(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    save_file({"a.weight": torch.ones(2)}, folder / "weights.safetensors")
    save_file({"exp_avg/a.weight": torch.zeros(2)}, folder / "moments.safetensors")
    content = {**state(4).model_dump(mode="json"), "format_version": 1}
    (folder / "state.json").write_text(json.dumps(content))
    result = command("verify", tmp_path)
    assert (result.exit_code, result.stdout) == (
        0,
        f"{folder}: all there, and its values cannot be verified: format version 1 has no hashes\n",
    )


def test_a_checkpoint_is_looked_at_from_inside_of_its_run(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out / "checkpoints" / "step-00000008")
    assert [one["step"] for one in as_json("ls", ".")] == [8]
    assert [one["step"] for one in as_json("ls", "..")] == [4, 8, 12]
    assert [one["step"] for one in as_json("ls", "../..")] == [4, 8, 12]
    assert as_json("show", "../step-00000004")["step"] == 4


def test_prune_keeps_the_newest_and_what_was_kept_aside(out: Path) -> None:
    run(out.parent, "--resume", out / "checkpoints" / "step-00000008", "--stop-after", 9, backend="cpu")
    result = command("prune", out, "--keep", "1")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "2 deleted"
    assert checkpoints(out) == [9]
    assert (out / "checkpoints" / "superseded-1" / "step-00000012").is_dir()
    assert as_json("prune", out, "--keep", "1", "--aside") == [
        f"{out}/checkpoints/superseded-1/step-00000012"
    ]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000009"]


def test_prune_takes_the_folder_of_checkpoints_as_the_others_do(out: Path) -> None:
    assert command("prune", out / "checkpoints", "--keep", "2").exit_code == 0
    assert checkpoints(out) == [8, 12]


def test_prune_tells_what_it_cannot_delete(out: Path) -> None:
    in_the_way = out / "checkpoints" / ".step-00000004.removed" / "file"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    result = command("prune", out, "--keep", "1")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: cannot delete from {out}/checkpoints: ")
    assert "step-00000004" in result.stderr


def test_prune_keeps_the_best(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"checkpoint": "{every_steps: 4, keep: 3, best: true}", "train__eval_every": 3}
    run(tmp_path, "--out", out, **options)
    command("prune", out, "--keep", "1")
    assert checkpoints(out) == [3, 12]


@pytest.mark.parametrize("words", [["ls"], ["show"], ["verify"], ["prune", "--keep", "1"]])
def test_what_is_no_run_is_refused(tmp_path: Path, words: list[str]) -> None:
    result = command(words[0], tmp_path, *words[1:])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path} ")
    missing = command(words[0], tmp_path / "missing", *words[1:])
    assert missing.exit_code == 2
    assert missing.stderr.startswith(f"error: {tmp_path}/missing is not ")


@pytest.mark.parametrize("word", ["ls", "show", "verify"])
def test_a_file_is_not_said_to_be_missing(tmp_path: Path, word: str) -> None:
    (tmp_path / "record.json").touch()
    result = command(word, tmp_path / "record.json")
    assert (result.exit_code, "record.json is a file; expected a run" in result.stderr) == (2, True)
