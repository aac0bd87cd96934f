"""User code that fails is told with its place, never as a traceback; the request can be tried again."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from xtrain.cli import main

MODULE = """
import sys
import torch
from torch import nn

class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
    def forward(self, tokens):
        raise ValueError("no idea what to do")

class Flat(Failing):
    def forward(self, tokens):
        return self.weight

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
    def forward(self, tokens):
        return self.embedding(tokens)

def raises(): raise OSError("no such weights")
def leaves(): sys.exit(3)
def wrong_type(): return 1 + "1"
def takes(width): return Failing()
def nothing(): return 7
def frozen(): return nn.Identity()
def failing(): return Failing()
def flat(): return Flat()
def small(): return Small()
"""

REFUSED = {
    "own:raises": "model.factory own:raises failed: OSError: no such weights (at ",
    "own:leaves": "model.factory own:leaves failed: SystemExit: 3 (at ",
    "own:wrong_type": "model.factory own:wrong_type failed: TypeError: unsupported operand",
    "own:takes": "model.factory own:takes cannot be called with model.args {}: missing a required argument",
    "own:nothing": "model.factory own:nothing returned a int, expected a torch.nn.Module",
    "own:frozen": "model.factory own:frozen returned a model with nothing to train in it",
    "own:absent": "model.factory own:absent: own has no function 'absent'",
    "broken:build": "model.factory broken:build cannot be imported: SyntaxError:",
    "missing:build": "model.factory missing:build: no module named 'missing'",
}
FAILED = {
    "own:failing": "the model of model.factory own:failing failed in its forward: ValueError: no idea",
    "own:flat": "the model of model.factory own:flat returned (1,) for tokens (4, 16); expected logits",
    "own:small": "the model of model.factory own:small failed in its forward: IndexError:",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "own", raising=False)
    return tmp_path


def run(folder: Path, factory: str) -> tuple[int, str]:
    spec = {
        "model": {"factory": factory},
        "data": {"source": "synthetic", "seq_len": 16, "tokens": 2000},
        "batch": {"global": 4},
        "train": {"steps": 2},
        "optimizer": {"lr": 0.1},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    done = CliRunner().invoke(main, ["run", "spec.yaml", "--backend", "cpu", "--out", "out"])
    assert "Traceback" not in done.output
    return done.exit_code, done.output


@pytest.mark.parametrize("factory", REFUSED)
def test_a_factory_that_cannot_be_used_is_refused_and_leaves_nothing(folder: Path, factory: str) -> None:
    code, output = run(folder, factory)
    assert REFUSED[factory] in output
    assert code == 2
    assert not (folder / "out").exists()


@pytest.mark.parametrize("factory", FAILED)
def test_a_model_that_fails_in_its_forward_is_a_failed_run(folder: Path, factory: str) -> None:
    code, output = run(folder, factory)
    assert FAILED[factory] in output
    assert code == 1
    assert (folder / "out" / "record.json").exists()
