"""What all pages of results begin with."""

from __future__ import annotations

import pytest

from benchmarks.page import command_of


@pytest.mark.parametrize("out", [["--out", "/mine"], ["--out=/mine"], []])
def test_the_command_is_told_without_the_folder_it_wrote_to(
    out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["peers.py", "--quick", *out, "--outer", "3"])
    assert command_of("peers") == "python -m benchmarks.peers --quick --outer 3"
