"""Which test proves which claim about checkpoints; writes docs/proofs.md from a run of those tests.

    python -m tests.proofs                # minutes
    python -m tests.proofs REPORT.xml     # or from what `pytest --junitxml=REPORT.xml`: `make test proofs`

Tests give figures away with pytest's `record_property`: whole numbers are counts, which the page adds up; of
other figures it shows the worst.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "proofs.md"
Figure: TypeAlias = "int | float"

HEAD = """\
# What is proven about checkpoints

Written by `python -m tests.proofs` from a run of the tests that are named here; they are part of the suite.
A whole number is what they counted, all tests of a line together; another figure is the worst that one of
them measured. Losses are compared step by step with the uninterrupted plain run (bare torch, one process),
relatively; in fp32 unless a line says so.
How long training stands still for a save is measured, not tested:
[What a save costs](checkpoints.md#what-a-save-costs).
"""


@dataclass(frozen=True)
class Proof:
    """A claim and the tests that would fail if it were wrong."""

    name: str
    claim: str
    tests: Sequence[str]
    """`path::function`, all its parameters."""


RESUME, CONFORMANCE = "tests/test_resume.py", "tests/conformance/test_resume.py"

PROOFS = (
    Proof(
        "R1",
        "Two ranks killed (SIGKILL) before and inside of everything that a save does: the newest whole one "
        "is found, and none that is torn",
        [
            "tests/checkpoints/test_killed_saves.py::"
            "test_a_save_killed_at_any_moment_leaves_the_newest_whole_one_and_is_no_obstacle",
            "tests/checkpoints/test_killed_saves.py::"
            "test_a_save_killed_while_it_replaces_one_of_its_step_leaves_the_old_or_the_new_one",
        ],
    ),
    Proof(
        "R2",
        "Every file truncated, replaced or removed, and one byte flipped in it: found by `verify` and by a "
        "resume, named, and the checkpoint before is used; any single byte flipped: found",
        [
            f"{RESUME}::test_a_damaged_checkpoint_is_named_kept_aside_and_the_one_before_is_used",
            "tests/checkpoints/test_format.py::test_any_byte_that_flipped_is_found",
            "tests/checkpoints/test_format.py::test_a_damaged_file_is_named_without_reading_it_all",
        ],
    ),
    Proof(
        "R3",
        "Twenty SIGKILLs at random moments of a run, resumed each time, saving in the background or not: the "
        "very bytes of the uninterrupted run, the same sequences and the same line for every step",
        ["tests/test_killed_runs.py::test_twenty_random_kills_change_neither_the_weights_nor_the_log"],
    ),
    Proof(
        "R4",
        "Resumed twice in a row, at step 0, and at the last step",
        [
            f"{RESUME}::test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one",
            f"{RESUME}::test_without_a_checkpoint_it_starts_at_step_0_and_says_so",
            "tests/checkpoints/test_foreign.py::test_a_folder_of_hugging_faces_form_becomes_step_0",
            f"{RESUME}::test_a_finished_run_without_more_steps_stays_as_it_is_and_says_so",
            f"{RESUME}::test_a_finished_run_goes_on_with_more_steps",
        ],
    ),
    Proof(
        "R5",
        "One process, two, one again, on each of ZeRO 0 to 3: the losses of the uninterrupted run",
        [f"{CONFORMANCE}::test_a_run_moves_from_one_process_to_two_and_back"],
    ),
    Proof(
        "R6",
        "cpu, ZeRO-3 on two processes, cpu, ZeRO-1, with accumulation: the losses of the uninterrupted run",
        [f"{CONFORMANCE}::test_a_run_moves_to_zero_3_on_two_processes_back_and_to_zero_1"],
    ),
    Proof(
        "R6, control",
        "The same with the moments dropped at the first move is told apart",
        [f"{CONFORMANCE}::test_a_run_that_moves_without_its_moments_is_told_apart"],
    ),
    Proof(
        "R6, fp16",
        "The same way in fp16: loss scale and skipped steps equal at every step, the scale counted on across "
        "moves (losses against fp16 on one process)",
        [f"{CONFORMANCE}::test_the_loss_scale_moves_with_the_run"],
    ),
    Proof(
        "R7",
        "A NaN in one micro-batch on one rank: the same steps are skipped on every rank, and the run goes on",
        [
            "tests/conformance/test_parity.py::"
            "test_what_goes_wrong_on_one_rank_is_skipped_at_the_same_steps_by_all"
        ],
    ),
    Proof(
        "R8",
        "A full disk, a read-only folder, and a SIGTERM in a step or in a save cost only what could not be "
        "written",
        [
            f"{RESUME}::test_a_full_disk_is_told_and_costs_only_what_did_not_fit",
            f"{RESUME}::test_a_full_disk_is_told_and_costs_only_what_did_not_fit_in_the_background",
            f"{RESUME}::test_a_folder_that_became_read_only_is_told_and_costs_nothing",
            f"{RESUME}::test_a_full_disk_stops_a_run_that_asked_for_it",
            f"{RESUME}::test_files_that_may_not_grow_are_told_and_cost_nothing",
            "tests/test_whole_runs.py::test_a_signal_finishes_the_step_saves_and_exits_with_75",
            "tests/test_whole_runs.py::test_a_signal_in_the_middle_of_a_save_costs_no_step",
            "tests/test_signals.py::test_a_signal_saves_and_the_printed_command_goes_on",
        ],
    ),
    Proof(
        "R9",
        "A rank that hangs, or is killed, is named, ends the others, and costs the steps since the last save",
        [
            "tests/launching/test_hanging.py::test_one_stopped_rank_ends_the_run_and_every_rank_shows_where_it_stood",
            "tests/launching/test_hanging.py::"
            "test_one_killed_rank_ends_the_run_and_costs_the_steps_since_the_last_save",
            "tests/launching/test_launch.py::test_killed_rank_is_named_and_the_ones_that_wait_for_it_end",
            "tests/launching/test_launch.py::test_a_worker_that_dies_is_started_again_with_all_others",
        ],
    ),
)


@dataclass(frozen=True)
class Case:
    """One test that ran."""

    test: str
    """As in Proof.tests."""
    outcome: str
    """passed, skipped or failed."""
    figures: Mapping[str, Figure]


def run_tests(tests: Sequence[str]) -> list[Case]:
    """SystemExit where pytest itself could not do its work."""
    with tempfile.TemporaryDirectory(prefix="proofs-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=ROOT, check=False)
        return list(read_report(report.read_text(encoding="utf-8")))


def read_report(text: str) -> Iterator[Case]:
    """The cases of a JUnit report, as pytest writes it."""
    for case in ElementTree.fromstring(text).iter("testcase"):
        children = {child.tag for child in case}
        outcome = (
            "failed" if children & {"failure", "error"} else "skipped" if "skipped" in children else "passed"
        )
        figures = {one.attrib["name"]: _figure(one.attrib["value"]) for one in case.iter("property")}
        path = case.attrib["classname"].replace(".", "/")
        yield Case(f"{path}.py::{case.attrib['name'].partition('[')[0]}", outcome, figures)


def render(proof: Proof, cases: Sequence[Case]) -> str:
    """One line of the page's table; SystemExit where a test of it failed or was not found."""
    own = [case for case in cases if case.test in proof.tests]
    wrong = [case.test for case in own if case.outcome == "failed"]
    if missing := wrong or sorted(set(proof.tests) - {case.test for case in own}):
        raise SystemExit(f"{proof.name} is not proven: {missing[0]}")
    passed = sum(case.outcome == "passed" for case in own)
    skipped = f", {len(own) - passed} skipped" if passed < len(own) else ""
    names = sorted({name for case in own for name in case.figures})
    figures = "; ".join(
        _told(name, [case.figures[name] for case in own if name in case.figures]) for name in names
    )
    tests = "<br>".join(f"`{test}`" for test in proof.tests)
    return f"| {proof.name} | {proof.claim} | {passed} passed{skipped} | {figures} | {tests} |"


def _figure(text: str) -> Figure:
    return int(text) if text.isdigit() else float(text)


def _told(name: str, found: Sequence[Figure]) -> str:
    counts = all(isinstance(figure, int) for figure in found)
    return f"{name}: {sum(found):,}" if counts else f"{name}: {max(found):.3g}"


def page(cases: Sequence[Case]) -> str:
    head = ["| | claim | tests | figures | where |", "|---|---|---|---|---|"]
    return "\n".join([HEAD, *head, *(render(proof, cases) for proof in PROOFS)]) + "\n"


def main() -> None:
    """From the JUnit reports that are named, or else from a run of the tests."""
    reports = [Path(name).read_text(encoding="utf-8") for name in sys.argv[1:]]
    cases = [case for report in reports for case in read_report(report)] or run_tests(
        [test for proof in PROOFS for test in proof.tests]
    )
    PAGE.write_text(page(cases), encoding="utf-8")


if __name__ == "__main__":
    main()
