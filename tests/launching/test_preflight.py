"""The processes of a job are compared before anything is built, and the odd one is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.clean_process import start_module
from tests.jobs import free_port
from xtrain.launching.preflight import Facts, clock_notes, differences


def job(*torch_versions: str, per_host: int = 1) -> list[Facts]:
    return [
        Facts(rank, f"gpu{rank // per_host}", {"torch": version, "spec": "hash 1"})
        for rank, version in enumerate(torch_versions)
    ]


def test_equal_processes_have_no_differences() -> None:
    assert differences(job("2.13", "2.13", "2.13")) == []


def test_the_host_that_differs_from_most_is_named_with_its_ranks() -> None:
    odd = differences(job("2.12", "2.12", "2.13", "2.13", "2.13", "2.13", per_host=2))
    assert odd == ["torch: 2.12 on gpu0 (ranks 0, 1), 2.13 on the others"]


def test_where_two_stand_against_each_other_rank_0_is_right() -> None:
    assert differences(job("2.13", "2.12")) == ["torch: 2.12 on gpu1 (rank 1), 2.13 on the others"]


def test_every_value_that_differs_has_a_line() -> None:
    odd = differences(job("2.13", "2.12", "2.13", "2.11"))
    assert odd == [
        "torch: 2.12 on gpu1 (rank 1), 2.13 on the others",
        "torch: 2.11 on gpu3 (rank 3), 2.13 on the others",
    ]


@pytest.mark.parametrize(
    ("clocks", "told"),
    [
        ((100.0, 103.0, 99.0), []),
        ((100.0, 100.0, 40.0), ["gpu2 (rank 2) is 60 s behind"]),
        ((3700.0, 100.0, 101.0), ["gpu0 (rank 0) is 3599 s ahead of"]),
        ((100.0, 160.0), ["gpu1 (rank 1) is 60 s ahead of"]),
    ],
)
def test_a_clock_that_is_not_like_most_is_told(clocks: Sequence[float], told: list[str]) -> None:
    notes = clock_notes(job(*["2.13"] * len(clocks)), clocks)
    assert [note.partition("the clock of ")[2].partition(" the others")[0] for note in notes] == told


def arrived(folder: Path, what: str) -> list[str]:
    """What two processes say, of which the second has `what` planted in it."""
    said = [folder / "0", folder / "1"]
    port = free_port()
    processes = [
        start_module("tests.workers.arriving", rank, 2, port, what, said=said[rank], environ={})
        for rank in (0, 1)
    ]
    for process in processes:
        process.join(120)
    return [one.read_text().strip() for one in said]


@pytest.mark.slow
def test_processes_that_fit_add_up_and_a_clock_is_no_reason_to_stop(tmp_path: Path) -> None:
    first, second = arrived(tmp_path, "late-clock")
    assert re.fullmatch(r"note: the clock of host-1 \(rank 1\) is 36\d\d s ahead of .*\nfits", first)
    assert second.endswith("\nfits")


@pytest.mark.slow
def test_another_spec_is_refused_by_all_and_its_host_is_named(tmp_path: Path) -> None:
    said = arrived(tmp_path, "other-spec")
    assert said[0] == said[1]
    assert re.fullmatch(
        r"2: the processes of this job differ, nothing was started:\n"
        r"  spec: hash \w{12} on host-1 \(rank 1\), hash \w{12} on the others",
        said[0],
    )


@pytest.mark.slow
def test_one_that_fails_before_is_told_to_those_that_wait_for_it(tmp_path: Path) -> None:
    assert arrived(tmp_path, "fails") == [
        "2: rank 1 on host-1 did not begin: no such file",
        "2: no such file",
    ]
