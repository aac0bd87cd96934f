"""The DeepSpeed engine against a plain loop, through the contract: ZeRO 0-3, one and two processes."""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from backends.host_attention import quicken_attention
from tests.backends import deepspeed_worker as worker
from tests.jobs import ON_THE_CPU, run_job
from xtrain import registry

USABLE = registry.survey()["deepspeed"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not USABLE.usable, reason=USABLE.reason),
]

TOLERANCE = 1e-5
"""Relative, fp32; measured: 1.4e-7."""
FP32_BYTES = 4
PADDING = 2
"""DeepSpeed pads a flat group to this many elements for each process (stages 1 and 2)."""
WORLDS = (1, 2)
EVERYWHERE = [
    pytest.param(world, sharding, id=f"zero{stage}-x{world}")
    for world in WORLDS
    for stage, sharding in enumerate(worker.SHARDING)
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """What the worker wrote, by world size."""
    found = {}
    for world in WORLDS:
        out = tmp_path_factory.mktemp("deepspeed") / "out.json"
        # On the CPU wherever it runs: the plain loop beside it does. Its launcher sets LOCAL_SIZE.
        run_job(world, "tests.backends.deepspeed_worker", out, **ON_THE_CPU, LOCAL_SIZE=str(world))
        found[world] = json.loads(out.read_text())
    return found


@dataclass
class Curve:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@cache
def plain(
    adamw: bool = False,
    clip: float | None = None,
    lr_factor: float = 1.0,
    gradient_factor: float = 1.0,
    bf16: bool = False,
    refused: Collection[int] = (),
) -> Curve:
    """One process, every sequence of the global batch in turn, in bare torch.

    But for attention's backward pass in bf16, which the engine exchanges in its process: it rounds otherwise.
    """
    if bf16:
        quicken_attention()
    model = worker.Source().build()
    section = worker.ADAMW if adamw else worker.SGD
    optimizer = build_optimizer(model, adamw, section["lr"] * lr_factor)
    curve = Curve()
    for step in range(worker.STEPS):
        batches = worker.global_batch(step)
        tokens, total = worker.count_targets(batches), 0.0
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets))
            (loss * (gradient_factor / tokens)).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if clip is None else clip)
        if step not in refused:
            optimizer.step()
        optimizer.zero_grad()
        curve.losses.append(total / tokens)
        curve.norms.append(norm.item())
    return curve


def build_optimizer(model: torch.nn.Module, adamw: bool, lr: float) -> torch.optim.Optimizer:
    if not adamw:
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=worker.SGD["momentum"])
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)


def difference(found: list[float], expected: list[float]) -> float:
    """The largest relative difference."""
    assert len(found) == len(expected) == worker.STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def column(run: dict[str, Any], name: str) -> list[Any]:
    return [values[name] for values in run["steps"]]


@pytest.mark.parametrize(("world", "sharding"), EVERYWHERE)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sgd", {}),
        ("sgd-clipped", {"clip": worker.BITING_CLIP}),
        ("adamw", {"adamw": True, "clip": 1.0}),
    ],
)
def test_losses_and_norms_equal_a_plain_loops(
    name: str, settings: dict[str, Any], world: int, sharding: str, reports: dict[int, dict[str, Any]]
) -> None:
    run, expected = reports[world]["runs"][sharding][name], plain(**settings)
    assert difference(column(run, "loss"), expected.losses) <= TOLERANCE
    assert difference(column(run, "grad_norm"), expected.norms) <= TOLERANCE
    assert column(run, "skipped") == [False] * worker.STEPS


@pytest.mark.parametrize(("world", "sharding"), EVERYWHERE)
def test_communication_has_a_span_of_its_own_on_every_rank(
    world: int, sharding: str, reports: dict[int, dict[str, Any]]
) -> None:
    """In a step whose losses are those of the plain loop, like all others."""
    spans = reports[world]["runs"][sharding]["sgd"]["spans"]
    own = {"forward", "backward", "optimizer"}
    assert [set(rank) for rank in spans] == [own | ({"reduce"} if world > 1 else set())] * world
    assert all(seconds > 0 for rank in spans for seconds in rank.values())


@pytest.mark.parametrize("fault", [{"lr_factor": 1.01}, {"gradient_factor": 2.0}], ids=str)
@pytest.mark.parametrize(("world", "sharding"), EVERYWHERE)
def test_faults_are_told_apart(
    fault: dict[str, float], world: int, sharding: str, reports: dict[int, dict[str, Any]]
) -> None:
    """The comparison above would see a wrong learning rate and gradients twice too large."""
    losses = column(reports[world]["runs"][sharding]["sgd"], "loss")
    assert difference(losses, plain(**fault).losses) > 10 * TOLERANCE


@pytest.mark.parametrize(("world", "sharding"), EVERYWHERE)
def test_a_refused_step_leaves_no_trace(
    world: int, sharding: str, reports: dict[int, dict[str, Any]]
) -> None:
    run = reports[world]["runs"][sharding]["guarded"]
    expected = plain(clip=worker.BITING_CLIP, refused=worker.REFUSED_STEPS)
    assert column(run, "skipped") == [step in worker.REFUSED_STEPS for step in range(worker.STEPS)]
    assert difference(column(run, "loss"), expected.losses) <= TOLERANCE
    assert difference(column(run, "grad_norm"), expected.norms) <= TOLERANCE


@pytest.mark.parametrize(("world", "sharding"), EVERYWHERE)
def test_a_guard_is_asked_with_global_loss_and_norm_before_clipping(
    world: int, sharding: str, reports: dict[int, dict[str, Any]]
) -> None:
    run = reports[world]["runs"][sharding]["guarded"]
    losses, norms = (list(told) for told in zip(*run["asked"], strict=True))
    assert difference(losses, column(run, "loss")) <= TOLERANCE
    assert difference(norms, column(run, "grad_norm")) <= TOLERANCE
    assert min(norms) > worker.BITING_CLIP


@pytest.mark.parametrize(("world", "sharding"), EVERYWHERE)
def test_bf16_is_plain_autocast(world: int, sharding: str, reports: dict[int, dict[str, Any]]) -> None:
    """Every micro-batch is one sequence on any world size: the same products, the same roundings."""
    losses = column(reports[world]["runs"][sharding]["bf16"], "loss")
    assert difference(losses, plain(bf16=True).losses) <= TOLERANCE
    assert difference(losses, plain().losses) > TOLERANCE  # it does compute in bf16


@pytest.mark.parametrize("name", ["sgd", "bf16"])
@pytest.mark.parametrize(("world", "sharding"), EVERYWHERE)
def test_evaluation_sums_over_ranks_in_the_precision_of_training(
    name: str, world: int, sharding: str, reports: dict[int, dict[str, Any]]
) -> None:
    total, tokens = reports[world]["runs"][sharding][name]["evaluated"]
    batches, model, expected = worker.global_batch(99), worker.Source().build(), 0.0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
        for batch in batches:
            expected += model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)).item()
    assert tokens == worker.count_targets(batches)
    assert total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("world", "sharding"), EVERYWHERE)
def test_ranks_know_their_place_and_gather_in_order(
    world: int, sharding: str, reports: dict[int, dict[str, Any]]
) -> None:
    run = reports[world]["runs"][sharding]["sgd"]
    assert run["place"] == [0, world]
    assert run["gathered"] == [{"rank": rank} for rank in range(world)]
    assert run["parameter_count"] == sum(p.numel() for p in worker.Source().build().parameters())


def held_bytes(world: int, stage: int) -> dict[str, int]:
    """By formula, of each rank between two updates: SGD with momentum, two parameter groups."""
    sizes = [(p.numel(), p.ndim >= 2) for p in worker.Source().build().parameters()]
    whole = sum(size for size, _ in sizes)
    padded = sum(
        round_up(sum(size for size, matrix in sizes if matrix is decayed), PADDING * world)
        for decayed in (True, False)
    )
    pieces = sum(-(-size // world) for size, _ in sizes)
    weights, own = [(whole, whole), (padded, padded // world), (padded, padded // world), (pieces, pieces)][
        stage
    ]
    copies = {"master": own} if stage else {}
    vectors = sum(size for size, matrix in sizes if not matrix)
    gathered = vectors if stage == 3 and world > 1 else 0  # biases and norms stay gathered
    elements = {"parameters": weights + gathered, "optimizer": own, **copies}
    return {category: FP32_BYTES * count for category, count in elements.items()}


def round_up(size: int, step: int) -> int:
    return -(-size // step) * step


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", range(4))
def test_memory_by_category_is_each_ranks_share_to_the_byte(
    stage: int, world: int, reports: dict[int, dict[str, Any]]
) -> None:
    for found in reports[world]["runs"][worker.SHARDING[stage]]["sgd"]["held_bytes"]:
        steady = {key: size for key, size in found.items() if size and key not in ("gradients", "other")}
        assert steady == held_bytes(world, stage)


@pytest.mark.parametrize("world", WORLDS)
def test_stage_3_leaves_torchs_linear_alone(world: int, reports: dict[int, dict[str, Any]]) -> None:
    assert reports[world]["linear_untouched"]


@pytest.mark.parametrize("world", WORLDS)
def test_deepspeed_knows_how_many_processes_a_host_has(
    world: int, reports: dict[int, dict[str, Any]]
) -> None:
    """Else it starts `numactl` at every reduction of stage 3, and takes NUMA nodes for processes."""
    assert reports[world]["processes_here"] == world


@pytest.mark.parametrize("world", WORLDS)
def test_no_memory_of_the_host_is_left_taken(world: int, reports: dict[int, dict[str, Any]]) -> None:
    """Else each process leaves 66 MiB in /dev/shm, for a reduction that no training uses."""
    assert reports[world]["left_in_shared_memory"] == []
