"""The zero_optimization and aio blocks: stage, buckets, offload.

Sizes follow from the model: of a preset before it is built, of others once it is (`built_sizes`). DeepSpeed's
own defaults, made for models of many billions, would gather all of a small one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xtrain.contract import JSON
from xtrain.exchange.translation import Setting
from xtrain.models.presets import dimensions
from xtrain.spec.tree import STAGES

if TYPE_CHECKING:
    from xtrain.spec.tree import OffloadTarget, Spec

SMALLEST_BUCKET = 2**22
"""Elements; below it a collective costs its latency, whatever its size."""
PERSISTENT = 100_000
"""Numbers up to which DeepSpeed keeps a parameter whole, where it is not told."""
PARAMETER_BUFFERS = 4
BLOCK = "zero_optimization"
MODEL = ("model.hidden",)
UNBUILT = (
    "ZeRO's sizes follow from the model, which is known once it is built: a run adds them, and its "
    "ds_config.json has them"
)


@dataclass(frozen=True)
class Pieces:
    """Parts of a model in parameters, as far as ZeRO's knobs need them."""

    block: int
    """One block's."""
    largest: int
    """The largest single parameter: the token embedding, or a matrix of a block."""
    vector: int
    """The largest bias: what is no longer than this is never partitioned."""
    vectors: int
    """All biases and norms together."""
    matrices: int
    """How many parameters are no vectors."""


def pieces_of(spec: Spec) -> Pieces | None:
    """Of a preset; None where the model is known only once it is built."""
    if spec.model.preset is None:
        return None
    size = dimensions(spec)
    h = size.hidden
    return Pieces(
        block=12 * h * h + 13 * h,
        largest=max(size.vocab_size * h, size.positions * h, 4 * h * h),
        vector=4 * h,
        vectors=size.layers * 13 * h + 2 * h,
        matrices=4 * size.layers + 2,
    )


def stage_of(spec: Spec) -> int:
    """The ZeRO stage: what the spec shards, raised to 1 for 16-bit weights.

    DeepSpeed 0.19.8 trains wrongly at stage 0 with its bf16 and fp16 blocks (the first update is
    that of Adam's second step).
    """
    stage = STAGES.index(spec.techniques.sharding)
    return max(stage, 1) if spec.precision.weights != "fp32" else stage


def zero_settings(spec: Spec, world: int) -> Iterator[Setting]:
    """zero_optimization, and aio where something lives on a drive."""
    stage, pieces = stage_of(spec), pieces_of(spec)
    raised = "raised from 0: DeepSpeed trains 16-bit weights wrongly there" if is_raised(spec) else ""
    yield Setting(f"{BLOCK}.stage", stage, ("memory.sharding",), raised)
    yield Setting(f"{BLOCK}.contiguous_gradients", True, (), "fixed: DeepSpeed's default, keeps memory whole")
    yield Setting(f"{BLOCK}.overlap_comm", True, (), "fixed: reduce while backward goes on")
    if pieces is not None:
        yield from sizes(spec, pieces, world)
    if stage == 3:
        reason = "fixed: xtrain saves fp32 weights by itself"
        yield Setting(f"{BLOCK}.stage3_gather_16bit_weights_on_model_save", False, (), reason)
    reason = "fixed: DeepSpeed's default replaces torch's linear in the whole process, and changes autocast"
    yield Setting(f"{BLOCK}.memory_efficient_linear", False, (), reason)
    yield from _offload(spec, pieces, world)


def is_raised(spec: Spec) -> bool:
    """Whether the stage is higher than the spec says."""
    return spec.memory != "auto" and stage_of(spec) != STAGES.index(spec.memory.sharding)


def bucket_numbers(block: int) -> int:
    """Of reduce_bucket_size and allgather_bucket_size, for blocks of so many; DeepSpeed takes no odd one."""
    return max(block + block % 2, SMALLEST_BUCKET)


def sizes(spec: Spec, pieces: Pieces, world: int) -> Iterator[Setting]:
    """All that DeepSpeed reads once the model is built: buckets, bounds on gathering, swapped groups."""
    yield from _buckets(pieces)
    if stage_of(spec) == 3:
        yield from _gathering_bounds(spec, pieces)
    if spec.techniques.offload.optimizer.device == "nvme":
        share = -(-max(pieces.block, pieces.largest) // world)
        rule = "one rank's share of a block: a buffer holds a sub-group, by default the whole model"
        yield Setting(f"{BLOCK}.sub_group_size", share, MODEL, rule)


def _buckets(pieces: Pieces) -> Iterator[Setting]:
    bucket = bucket_numbers(pieces.block)
    rule = f"one block's parameters (12 h^2 + 13 h), at least {SMALLEST_BUCKET:,}"
    yield Setting(f"{BLOCK}.reduce_bucket_size", bucket, MODEL, rule)
    yield Setting(f"{BLOCK}.allgather_bucket_size", bucket, MODEL, rule)


def _gathering_bounds(spec: Spec, pieces: Pieces) -> Iterator[Setting]:
    """How much stage 3 may have whole at once; gathered parameters stay below max_live_parameters."""
    on_drive = spec.techniques.offload.parameters.device == "nvme"
    prefetch = 0 if on_drive else pieces.block
    rule = "0: with parameters on a drive, swap buffers run out" if on_drive else "one block ahead"
    yield Setting(f"{BLOCK}.stage3_prefetch_bucket_size", prefetch, MODEL, rule)
    threshold, rule = pieces.vector, "biases and norms (up to 4 h) stay whole"
    yield Setting(f"{BLOCK}.stage3_param_persistence_threshold", threshold, MODEL, rule)
    live = 2 * (pieces.block + pieces.largest) + pieces.vectors
    rule = "two blocks, the largest parameter in use and one ahead, and what always stays whole"
    yield Setting(f"{BLOCK}.stage3_max_live_parameters", live, (*MODEL, "model.vocab_size"), rule)
    rule = "one block: kept when it is needed again that soon"
    yield Setting(f"{BLOCK}.stage3_max_reuse_distance", pieces.block, MODEL, rule)


def _offload(spec: Spec, pieces: Pieces | None, world: int) -> Iterator[Setting]:
    optimizer, parameters = spec.techniques.offload.optimizer, spec.techniques.offload.parameters
    if optimizer.enabled:
        yield from _target(f"{BLOCK}.offload_optimizer", optimizer, "memory.offload.optimizer")
    if optimizer.device == "nvme":
        reason = "fixed: parameter, gradient and Adam's two moments"
        yield Setting(f"{BLOCK}.offload_optimizer.buffer_count", 4, (), reason)
    if parameters.enabled:
        yield from _target(f"{BLOCK}.offload_param", parameters, "memory.offload.parameters")
    if parameters.device == "nvme" and pieces is not None:
        yield from _swap_buffers(pieces, world)
    if "nvme" in (optimizer.device, parameters.device):
        yield from _aio()


def _target(block: str, target: OffloadTarget, key: str) -> Iterator[Setting]:
    yield Setting(f"{block}.device", target.device, (f"{key}.device",))
    if target.device == "nvme":
        yield Setting(f"{block}.nvme_path", target.path, (f"{key}.path",))
    yield Setting(f"{block}.pin_memory", True, (), "fixed: DeepSpeed's default; copies overlap with compute")


def _swap_buffers(pieces: Pieces, world: int) -> Iterator[Setting]:
    block, rule = f"{BLOCK}.offload_param", "one for each parameter in use: nothing is read ahead"
    yield Setting(f"{block}.buffer_count", PARAMETER_BUFFERS, (), rule)
    share, rule = -(-pieces.largest // world), "one rank's share of the largest parameter"
    yield Setting(f"{block}.buffer_size", share, (*MODEL, "model.vocab_size"), rule)
    yield Setting(f"{block}.max_in_cpu", 0, (), "fixed: what is asked onto the drive goes there")


def _aio() -> Iterator[Setting]:
    values: dict[str, JSON] = {
        "block_size": 2**20,
        "queue_depth": 8,
        "intra_op_parallelism": 1,
        "single_submit": False,
        "overlap_events": True,
    }
    for key, value in values.items():
        yield Setting(f"aio.{key}", value, (), "fixed: DeepSpeed's default; tune it to the drive")
