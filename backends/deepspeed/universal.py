"""A checkpoint of ours as a universal one of DeepSpeed's, which any of its ZeRO stages and world sizes loads.

One folder serves stages 1, 2 and 3: they look for their metadata under different names. What DeepSpeed's
loader does not take from a universal checkpoint (scaler, frozen weights, buffers) is said, not written; its
weights are read from `zero/` alone. Written for DeepSpeed 0.19.8, and read back by it in the tests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xtrain.checkpoints.format import Checkpoint, wrapper_of
from xtrain.contract import StateKind
from xtrain.errors import RequestError

from .stored import LATEST
from .stored_whole import MODEL_STATES

DS_VERSION = "0.19.8"
"""Whose form this is; loaders refuse a checkpoint without one."""
_FOLDER = re.compile(r"\w[\w.-]*")
"""A parameter's name, which a checkpoint from elsewhere may have chosen to lead out of its folder."""
FILES: dict[str, StateKind] = {"fp32": "weight", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def write_universal(checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Into `folder`, a library's model under its names there; returns what is not carried.

    RequestError for moments that the form does not know.
    """
    import torch

    state, reader = checkpoint.state(), checkpoint.reader()
    extras: Any = state.extras[0]
    steps = int(extras.get("optimizer_steps") or 0)
    trained = sorted(
        key.removeprefix("exp_avg/") for key in reader.keys("exp_avg") if key.startswith("exp_avg/")
    )
    if not trained:
        raise RequestError(
            f"{checkpoint.path} has no moments of Adam, and a universal checkpoint knows no others; "
            "--to safetensors carries the weights"
        )
    tag, wrapper = folder / f"global_step{state.step}", wrapper_of(checkpoint.manifest.files)
    for name in trained:
        theirs = name.removeprefix(wrapper)
        if not _FOLDER.fullmatch(theirs):
            raise RequestError(f"{checkpoint.path}: {theirs!r} cannot be the name of a folder")
        place = tag / "zero" / theirs
        place.mkdir(parents=True)
        for file, kind in FILES.items():
            torch.save({"param": reader.read(name, kind), "cat_dim": 0}, place / f"{file}.pt")
        torch.save(torch.tensor(float(steps)), place / "step.pt")
    torch.save(_optimizer_state(len(trained), steps), tag / "zero" / "optimizer_state.pt")
    for file in MODEL_STATES:
        torch.save(_model_states(state.step), tag / file)
    (folder / LATEST["ds-universal"]).write_text(tag.name, encoding="utf-8")
    return list(_left_out(checkpoint, set(trained)))


def _optimizer_state(groups: int, steps: int) -> dict[str, Any]:
    """Groups without hyperparameters, so that the loading run keeps its own; as many as there can be."""
    import torch

    empty: list[dict[str, Any]] = [{"params": []} for _ in range(groups)]
    step = torch.tensor(float(steps))
    states = {"state": {0: {"step": step}}, "param_groups": empty}
    return {"param_groups": empty, "optimizer_state_dict": states, "ds_version": DS_VERSION}


def _model_states(step: int) -> dict[str, Any]:
    return {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": 0,
        "global_steps": step,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": DS_VERSION,
    }


def _left_out(checkpoint: Checkpoint, trained: set[str]) -> Iterator[str]:
    others = sorted(set(checkpoint.reader().keys("weight")) - trained)
    if others:
        yield f"frozen weights and buffers ({others[0]}, ...): DeepSpeed's loader takes trained weights alone"
    if fewer := checkpoint.state().extras[0].get("optimizer_steps_of"):
        yield f"how often {len(fewer)} parameters were updated: DeepSpeed counts for all together"  # type: ignore[arg-type]
    if checkpoint.state().extras[0].get("loss_scaler"):
        yield "the loss scale: DeepSpeed's loader begins with a new one"
    yield (
        "the schedule: where the loading run has a scheduler, load_checkpoint(..., "
        f"load_lr_scheduler_states=False), then engine.lr_scheduler.step({checkpoint.step})"
    )
    yield "random states, guards and the position in the data: xtrain's own"
