from __future__ import annotations

from pathlib import Path

import pytest

from xtrain.errors import RequestError
from xtrain.lanes import Lane
from xtrain.rungs import RUNGS, rung_overrides
from xtrain.spec import load_spec
from xtrain.variations import ladder, varied

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "configs" / "quickstart.yaml"


def test_every_lane_is_run_with_every_combination_of_values() -> None:
    lanes = varied([Lane("cpu"), Lane("deepspeed", 2)], ["precision=fp32,bf16", "batch.micro=4,8"])
    assert len(lanes) == 8
    assert lanes[1] == Lane("cpu", None, ("precision=fp32", "batch.micro=8"), "precision=fp32 batch.micro=8")
    assert [lanes[-1].name, lanes[-1].folder] == [
        "deepspeed:2 precision=bf16 batch.micro=8",
        "deepspeed-2-precision=bf16-batch.micro=8",
    ]
    assert varied([Lane("cpu")], []) == [Lane("cpu")]


def test_a_value_may_itself_have_commas() -> None:
    lanes = varied([Lane("cpu")], ["memory.checkpointing=none,{every: 2, x: [1, 2]},'a,b'"])
    assert [lane.overrides[0] for lane in lanes] == [
        "memory.checkpointing=none",
        "memory.checkpointing={every: 2, x: [1, 2]}",
        "memory.checkpointing='a,b'",
    ]


@pytest.mark.parametrize(
    ("variations", "message"),
    [
        (["batch.micro"], "--vary 'batch.micro': expected KEY=VALUE,VALUE such as batch.micro=4,8,16"),
        (["=1,2"], "--vary '=1,2': expected KEY=VALUE,VALUE"),
        (["batch.micro="], "--vary 'batch.micro=': expected KEY=VALUE,VALUE"),
        (["batch.micro=[1"], "--vary 'batch.micro=[1': expected KEY=VALUE,VALUE"),
        (["batch.micro=1] and [2"], "expected KEY=VALUE,VALUE"),
        (["batch.micro=1,1"], "a value stands twice; name each value once"),
        (["precision=fp32", "precision=bf16"], "--vary: a key stands twice in precision, precision"),
        ([f"train.seed={','.join(map(str, range(61)))}"], "--vary: found 61 lanes, expected at most 60"),
    ],
)
def test_what_is_no_variation_is_refused(variations: list[str], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        varied([Lane("cpu")], variations)
    assert message in str(caught.value)


@pytest.mark.parametrize("world", [1, 2])
def test_every_rung_is_a_spec_that_loads_and_each_adds_one_technique(world: int) -> None:
    spec = load_spec(SPEC)
    rungs = [load_spec(SPEC, overrides, world) for overrides in rung_overrides(spec, world)]
    assert len(rungs) == len(RUNGS)
    assert [rung.precision.dtype for rung in rungs] == ["fp32", "bf16", "bf16", "bf16", "bf16"]
    accumulation = [rung.accumulation(world) for rung in rungs]
    assert accumulation[:2] == [1, 1]
    assert min(accumulation[2:]) > 1
    assert [getattr(rung.memory, "sharding", None) for rung in rungs] == [*["none"] * 4, "parameters"]


def test_the_ladder_is_climbed_by_every_lane() -> None:
    lanes = ladder([Lane("cpu"), Lane("deepspeed", 2)], load_spec(SPEC))
    assert len(lanes) == 2 * len(RUNGS)
    assert (lanes[6].engine, lanes[6].rung) == ("deepspeed:2", 1)
    assert lanes[0].name == "cpu plain fp32"


def test_processes_that_cannot_share_the_batch_are_refused_with_those_that_can() -> None:
    spec = load_spec(SPEC, ("batch.global=8", "batch.micro=null"))
    message = (
        "batch.global 8 cannot be shared by 3 processes; expected a number that divides it, nearest: 2 or 4"
    )
    with pytest.raises(RequestError, match=message):
        ladder([Lane("deepspeed", 3)], spec)
    with pytest.raises(RequestError, match="shared by 16 processes"):
        ladder([Lane("deepspeed", 16)], spec)
