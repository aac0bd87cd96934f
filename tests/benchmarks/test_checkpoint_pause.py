"""The page on checkpoints has the table of the newest results, and a new one replaces it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.checkpoint_pause import table, with_table

ROOT = Path(__file__).parents[2]
LANE = {
    "lane": "zero1x2",
    "share_mib": 112.0,
    "predicted_mib": 111.99,
    "extra_mib": 20.7,
    "pause_s": 0.012,
    "torch_save_s": 0.1,
    "ratio": 0.12,
}


def test_the_page_has_the_table_of_the_newest_results() -> None:
    newest = max((ROOT / "benchmarks" / "results").glob("checkpoint-pause-*.json"))
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    assert table(json.loads(newest.read_text())["lanes"]) in page
    assert newest.name in page


def test_a_row_has_memory_kept_and_predicted_and_both_times() -> None:
    row = table([LANE]).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "zero1x2",
        "112.0 MiB",
        "112.0 MiB",
        "21 MiB",
        "12 ms",
        "100 ms",
        "0.12",
    ]


def test_a_lane_that_misses_the_bar_says_so() -> None:
    assert "0.26: misses the bar" in table([{**LANE, "ratio": 0.26}])


def test_a_new_table_replaces_the_old_one_and_nothing_else() -> None:
    old, new = table([LANE]), table([{**LANE, "lane": "cpu"}])
    assert with_table(f"before\n\n{old}\n\nafter\n", new) == f"before\n\n{new}\n\nafter\n"
    with pytest.raises(ValueError, match="no table"):
        with_table("before\n", new)
