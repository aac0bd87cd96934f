from __future__ import annotations

from tests.report.sample_lanes import (
    SPEC,
    STEP,
    compared,
    lane,
    memory,
    on_rung,
    run,
    slowed,
    steps,
    unfinished,
)
from xtrain.report.tables import tables
from xtrain.report.text import render_terminal
from xtrain.rungs import RUNGS


def test_every_rung_stands_beside_its_claim_as_a_share_of_the_first() -> None:
    halved = run(slowed(steps(), 1.25), memory=[memory({**STEP, "activations": 0, "logits": 0})])
    lanes = [lane("a 0"), lane("a 1", halved), unfinished("a 2", "out of memory")]
    comparison = compared(*(on_rung(lane, rung, "a") for rung, lane in enumerate(lanes)))
    assert [(rung.memory_share, rung.speed_share) for rung in comparison.ladder] == [
        (1.0, 1.0),
        (160 / 300, 0.8),
        (None, None),
    ]
    table = tables(comparison)[0]
    assert table.title == "The ladder, claimed for GPT-2 Large and measured here"
    assert table.rows == [
        ["a", "plain fp32", "fp32, batch.micro 8", "12 GB", "300.0 MiB (100%)", "100%", "100%"],
        ["a", "+ mixed precision", "fp32, batch.micro 8", "6 GB (-50%)", "160.0 MiB (53%)", "115%", "80%"],
        ["a", "+ gradient accumulation", "", "6 GB", "not measured", "110%", "not measured"],
    ]
    assert "out of memory" in render_terminal(comparison)


def test_a_rung_that_moved_nothing_is_told_from_one_that_saved_as_much() -> None:
    lanes = [lane("a 0"), lane("a 1"), lane("b 0")]
    comparison = compared(*(on_rung(one, int(one.name[2]), one.name[0]) for one in lanes))
    measured = [row[4] for row in tables(comparison)[0].rows]
    assert measured == ["300.0 MiB (100%)", "300.0 MiB (100%), as above", "300.0 MiB (100%)"]


def test_shares_are_of_the_same_backend_and_unknown_where_its_first_rung_failed() -> None:
    lanes = [unfinished("a 0", "full"), lane("a 1"), lane("b 0", run(slowed(steps(), 2))), lane("b 1")]
    ladder = compared(*(on_rung(lane, int(lane.name[2]), lane.name[0]) for lane in lanes)).ladder
    assert [rung.speed_share for rung in ladder] == [None, None, 1.0, 2.0]
    assert [rung.lane for rung in ladder] == ["a", "a", "b", "b"]


def test_an_odd_batch_in_a_record_is_shown_short() -> None:
    odd = {**SPEC, "batch": {"global": 8, "micro": "x\n" * 10_000}}
    (rung,) = compared(on_rung(lane("a", run(spec=odd)), 0, "cpu")).ladder
    assert len(rung.set_to) < 300
    assert rung.set_to.isprintable()


def test_the_name_of_a_ladder_is_shown_short() -> None:
    (rung,) = compared(on_rung(lane("a"), 0, "cpu\n\x1b[31m" + "x" * 10_000)).ladder
    assert rung.lane.isprintable()
    assert len(rung.lane) < 100


def test_the_claims_are_those_of_the_documents() -> None:
    assert [(rung.memory, rung.speed) for rung in RUNGS] == [
        ("12 GB", "100%"),
        ("6 GB (-50%)", "115%"),
        ("6 GB", "110%"),
        ("4 GB (-67%)", "90%"),
        ("2 GB per device", "80%"),
    ]
