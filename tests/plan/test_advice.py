"""The three scenarios of the source documents come out of the rules, and the rules react."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from xtrain.cli import main
from xtrain.errors import RequestError
from xtrain.plan.advice import Cluster, Shape, advise

NODE = Cluster(nodes=1, gpus_per_node=8, device_bytes=80e9)
EIGHT_NODES = Cluster(nodes=8, gpus_per_node=8, device_bytes=80e9)
SEVEN = Shape(params=7e9, layers=32, hidden=4096, seq=4096, batch=1)
SEVENTY = Shape(params=70e9, layers=80, hidden=8192, seq=4096, batch=1)


def test_7b_on_one_node_is_data_parallel_with_sharded_state() -> None:
    advice = advise(SEVEN, NODE)
    assert (advice.data, advice.tensor, advice.pipeline, advice.sequence) == (8, 1, 1, 1)
    assert advice.zero == "ZeRO-3 (FSDP)"


def test_70b_on_eight_nodes_is_tp_4_pp_2_dp_8() -> None:
    advice = advise(SEVENTY, EIGHT_NODES)
    assert (advice.tensor, advice.pipeline, advice.data, advice.sequence) == (4, 2, 8, 1)
    assert advice.degrees == "TP 4 x PP 2 x DP 8"
    assert advice.figures["pipeline bubble, 8 micro-batches"].startswith("11%")


def test_7b_with_8k_context_divides_sequences_and_wants_fused_attention() -> None:
    advice = advise(dataclasses.replace(SEVEN, seq=8192), NODE)
    assert (advice.sequence, advice.data, advice.tensor, advice.pipeline) == (2, 4, 1, 1)
    assert "fused attention" in advice.reasons[0]


def test_the_degrees_always_use_every_gpu() -> None:
    for shape in (SEVEN, SEVENTY, dataclasses.replace(SEVENTY, seq=32_768)):
        advice = advise(shape, EIGHT_NODES)
        assert advice.data * advice.tensor * advice.pipeline * advice.sequence == EIGHT_NODES.gpus


def test_a_node_of_six_is_divided_whole() -> None:
    six = dataclasses.replace(NODE, gpus_per_node=6)
    advice = advise(dataclasses.replace(SEVEN, seq=16_384), six)
    assert advice.sequence == 2
    assert advice.data * advice.tensor * advice.pipeline * advice.sequence == six.gpus


def test_tensors_and_sequences_share_a_node() -> None:
    advice = advise(dataclasses.replace(SEVENTY, seq=65_536), EIGHT_NODES)
    assert advice.tensor * advice.sequence <= EIGHT_NODES.gpus_per_node


@pytest.mark.parametrize("gpus_per_node", [3, 6, 8, 12])
def test_tensors_divide_the_gpus_of_a_node(gpus_per_node: int) -> None:
    for nodes in (4, 8, 20):
        advice = advise(SEVENTY, Cluster(nodes=nodes, gpus_per_node=gpus_per_node, device_bytes=120e9))
        assert gpus_per_node % advice.tensor == 0


def test_smaller_devices_divide_the_model_further() -> None:
    small = dataclasses.replace(EIGHT_NODES, device_bytes=40e9)
    assert advise(SEVENTY, small).tensor * advise(SEVENTY, small).pipeline > 8


def test_a_model_that_is_divided_for_its_activations_is_not_called_larger_than_a_node() -> None:
    advice = advise(dataclasses.replace(SEVEN, batch=70), NODE)
    assert advice.tensor * advice.pipeline > 1
    (why,) = (reason for reason in advice.reasons if reason.startswith("the training state"))
    assert "112.0 GB (16 bytes per parameter): a node can hold it, but not beside 75.2 GB of" in why


def test_one_gpu_has_nothing_to_shard_over_and_a_small_state_is_no_zero() -> None:
    advice = advise(Shape(params=2e6, layers=4, hidden=128, seq=128, batch=4), Cluster(1, 1, 80e9))
    assert advice.reasons[-1] == (
        "the training state is 32.0 MB (16 bytes per parameter); one GPU of 80.0 GB holds it"
    )


def test_what_fits_nowhere_is_refused() -> None:
    with pytest.raises(RequestError, match="do not fit on 8 GPUs"):
        advise(dataclasses.replace(SEVENTY, params=1e12), NODE)


def test_the_command_prints_degrees_reasons_and_figures() -> None:
    words = "plan --advise --params 70e9 --layers 80 --hidden 8192 --seq 4096 --batch 1 --gpus 8 --nodes 8"
    command = [*words.split(), "--device-memory", "80GB"]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0
    assert "TP 4 x PP 2 x DP 8" in result.stdout
    told = json.loads(CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False).stdout)
    assert (told["tensor"], told["pipeline"], told["data"]) == (4, 2, 8)


def test_a_stage_holds_as_many_micro_batches_as_there_are_stages() -> None:
    """1F1B: with 2 stages twice the activations of one micro-batch on half of the layers, so all of them."""
    wide = dataclasses.replace(SEVENTY, batch=12)
    divided = "by 8, the least that fits: "
    advice = advise(SEVENTY, EIGHT_NODES)
    (about,) = (reason for reason in advice.reasons if reason.startswith(divided))
    whole = SEVENTY.layers * SEVENTY.layer_bytes / advice.tensor
    assert f"{whole / 1e9:.1f} GB of checkpointed activations (micro-batches in flight: 2)" in about
    assert [advise(wide, EIGHT_NODES, micro_batches).pipeline for micro_batches in (1, 8)] == [2, 4]


def test_a_spec_is_advised_by_its_model_sequences_and_micro_batch(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "{model: {preset: gpt2-xl}, data: {source: synthetic, seq_len: 1024}, batch: {global: 64, micro: 8},"
        " train: {steps: 1}, optimizer: {lr: 1e-3}}"
    )
    words = ["plan", str(spec), "--advise", "--gpus", "8", "--json"]
    told = json.loads(CliRunner().invoke(main, words, catch_exceptions=False).stdout)
    sizes = "plan --advise --params 1557611200 --layers 48 --hidden 1600 --seq 1024 --batch 8 --gpus 8 --json"
    assert told == json.loads(CliRunner().invoke(main, sizes.split(), catch_exceptions=False).stdout)


@pytest.mark.parametrize("memory", ["", "80", "80 apples", "-1GB"])
def test_memory_must_have_a_unit(memory: str) -> None:
    command = ["plan", "--advise", "--device-memory", memory]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "expected a size such as 24GiB or 80GB" in result.stderr
