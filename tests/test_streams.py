"""What is said to people may be lost; a run and its exit code do not depend on it."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from xtrain.cli import main
from xtrain.cli.streams import Overheard

SPEC = """\
model: {preset: gpt2-nano}
data: {source: synthetic, tokens: 2000, seq_len: 8}
batch: {global: 2}
train: {steps: 3}
optimizer: {lr: 0.1}
log: {every_steps: 1}
"""


def without_reader() -> TextIO:
    reads, writes = os.pipe()
    os.close(reads)
    return os.fdopen(writes, "w", buffering=1)


def xtrain(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main.main(list(words))
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("stream", [without_reader, lambda: None], ids=["its reader is gone", "closed"])
def test_a_run_that_nobody_listens_to_is_saved_all_the_same(
    stream: Callable[[], TextIO | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text(SPEC)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream())
        assert xtrain("run", "spec.yaml", "--backend", "null", "--out", "out") == 0
    assert Path("out/checkpoints/step-00000003").is_dir()


def test_what_is_written_is_passed_on_until_that_fails() -> None:
    heard = io.StringIO()
    Overheard(heard).write("a line\n")
    assert heard.getvalue() == "a line\n"
    lost = Overheard(without_reader())
    assert [lost.write("a line\n") for _ in range(2)] == [7, 7]
    lost.flush()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_under_standard_output_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    with Path("/dev/full").open("w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        patch.setattr(sys, "stderr", said)
        assert xtrain("schema") == 1
    assert said.getvalue() == "error: cannot write: No space left on device\n"
