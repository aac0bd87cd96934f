"""Hostfiles: what is read, and the line that is named when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from xtrain.errors import RequestError
from xtrain.launching.hostfile import Host, read_hostfile


def read(folder: Path, text: str) -> list[Host]:
    path = folder / "hosts"
    path.write_text(text)
    return read_hostfile(path)


def test_hosts_come_in_order_and_comments_do_not_count(tmp_path: Path) -> None:
    text = "# the rack by the window\n\n10.0.0.2 slots=4\ngpu-1.cluster.org   slots=4  # slow disk\n"
    assert read(tmp_path, text) == [Host("10.0.0.2", 4), Host("gpu-1.cluster.org", 4)]


@pytest.mark.parametrize(
    "line",
    [
        "gpu1",
        "gpu1 slots=0",
        "gpu1 slots=-1",
        "gpu1 slots=two",
        "gpu1 slots = 2",
        "slots=2",
        "gpu1 8",
        "a;b slots=1",
    ],
)
def test_a_line_that_is_no_host_is_named_with_what_was_expected(tmp_path: Path, line: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(tmp_path, f"gpu0 slots=2\n{line}\n")
    assert str(refused.value) == (
        f"{tmp_path}/hosts, line 2: found {line!r}, expected a host and its number of processes, "
        "such as `gpu1 slots=8`"
    )


def test_a_host_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"hosts, line 2: host gpu0 stands twice"):
        read(tmp_path, "gpu0 slots=2\ngpu0 slots=2\n")


def test_unequal_slots_are_refused_with_the_number_that_works(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"gpu0 has slots=4, gpu1 slots=2; .*: slots=2 works for both"):
        read(tmp_path, "gpu0 slots=4\ngpu1 slots=2\n")


@pytest.mark.parametrize("text", ["", "# nobody\n\n"])
def test_a_file_without_hosts_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RequestError, match="names no host; expected a line such as `gpu1 slots=8`"):
        read(tmp_path, text)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot read hostfile .*nowhere: No such file or directory"):
        read_hostfile(tmp_path / "nowhere")
