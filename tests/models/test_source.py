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

class Lazy(Small):
    def __init__(self):
        super().__init__()
        self.head = nn.LazyLinear(3)

class Meta(Small):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 3, device="meta")

class Large(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(257, 257)
    def forward(self, tokens):
        return self.embedding(tokens)

class Detached(Large):
    def forward(self, tokens):
        return super().forward(tokens).detach()

class Narrow(Large):
    def forward(self, tokens):
        return super().forward(tokens)[..., :100]

class Asserts(Large):
    def forward(self, tokens):
        assert False, "never"

class Opens(Large):
    def forward(self, tokens):
        raise OSError("no such table")

class Leaves(Large):
    def forward(self, tokens):
        sys.exit(3)

def raises(): raise OSError("no such weights")
def leaves(): sys.exit(3)
def wrong_type(): return 1 + "1"
def takes(width): return Failing()
def nothing(): return 7
def frozen(): return nn.Identity()
def failing(): return Failing()
def flat(): return Flat()
def small(): return Small()
def lazy(): return Lazy()
def meta(): return Meta()
def detached(): return Detached()
def narrow(): return Narrow()
def asserts(): return Asserts()
def opens(): return Opens()
def leaves_later(): return Leaves()
"""

REFUSED = {
    "own:raises": "model.factory own:raises failed: OSError: no such weights (at ",
    "own:leaves": "model.factory own:leaves failed: SystemExit: 3 (at ",
    "own:wrong_type": "model.factory own:wrong_type failed: TypeError: unsupported operand",
    "own:takes": "model.factory own:takes cannot be called with model.args {}: missing a required argument",
    "own:nothing": "model.factory own:nothing returned a int, expected a torch.nn.Module",
    "own:frozen": "model.factory own:frozen returned a model with nothing to train in it",
    "own:absent": "model.factory own:absent: own has no function 'absent'",
    "own:lazy": "model.factory own:lazy returned a model whose head.weight has no shape yet; expected",
    "own:meta": "model.factory own:meta returned a model whose head.weight is on the meta device, without",
    "broken:build": "model.factory broken:build cannot be imported: SyntaxError:",
    "missing:build": "model.factory missing:build: no module named 'missing'",
}
FAILED = {
    "own:failing": "the model of model.factory own:failing failed in its forward: ValueError: no idea",
    "own:flat": "the model of model.factory own:flat returned (1,) for tokens (4, 16); expected logits",
    "own:small": "the model of model.factory own:small failed in its forward: IndexError:",
    "own:detached": "the loss of the model of model.factory own:detached has no gradient: its forward",
    "own:narrow": "own:narrow returned logits over 100 symbols, but the data has 257; expected as many",
    "own:asserts": "the model of model.factory own:asserts failed in its forward: AssertionError: never (at",
    "own:opens": "the model of model.factory own:opens failed in its forward: OSError: no such table (at",
    "own:leaves_later": "own:leaves_later failed in its forward: SystemExit: 3 (at ",
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


def test_the_place_of_a_failure_is_in_the_users_code(folder: Path) -> None:
    """The first steps are counted by xtrain's ledger, which stands between the model and torch."""
    _, output = run(folder, "own:small")
    assert f"(at {folder / 'own.py'}:" in output
