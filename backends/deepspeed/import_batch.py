"""The batch triple of a ds_config -> `batch` and the number of processes, by DeepSpeed's rules."""

from __future__ import annotations

from xtrain.contract import Problem
from xtrain.errors import SpecError
from xtrain.exchange.translation import Tree

from .leaves import Leaves


def import_batch(found: Leaves, world: int | None) -> Tree:
    """Any two of the three tell the third, for a number of processes; all three tell that number too."""
    total, micro, passes = (
        found.take(key, None)
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    )
    if total is None and micro is None:
        expected = "expected train_batch_size or train_micro_batch_size_per_gpu"
        raise SpecError("the ds_config", [Problem("train_batch_size", "", expected)])
    if world is None and None not in (total, micro, passes):
        world = max(1, total // (micro * passes))
        found.say("launch.processes", f"{total} / ({micro} x {passes}), from the three batch keys")
    world = world or 1
    if total is None:
        passes = passes or 1
        total = micro * passes * world
        found.say("batch.global", f"{micro} x {passes} passes x {world} process{'es' * (world > 1)}")
    if micro is None:
        micro = total // ((passes or 1) * world)
    if micro < 1 or total % (micro * world) or (passes or total // (micro * world)) * micro * world != total:
        given = f"{passes} passes x " if passes else ""
        expected = f"expected a multiple of {micro} sequences x {given}{world} process{'es' * (world > 1)}"
        offer = "give the number of processes with --world"
        raise SpecError("the ds_config", [Problem("train_batch_size", str(total), expected, offer)])
    tree: Tree = {"batch.global": int(total), "batch.micro": int(micro)}
    return {**tree, "launch.processes": world} if world > 1 else tree
