"""What DeepSpeed's own checkpoints and universal ones hold, by parameter name. Needs torch, not DeepSpeed.

    mp_rank_00_model_states.pt                           stages 0 to 2: weights, counters; 0: the optimizer
    zero_pp_rank_0_mp_rank_00_model_states.pt            stage 3: counters, shapes
    [bf16_]zero_pp_rank_<r>_mp_rank_00_optim_states.pt   a rank's flat pieces of fp32 weights and moments
    zero/<parameter>/{fp32,exp_avg,exp_avg_sq,step}.pt   universal: whole tensors

A parameter lies in each rank's flat pieces where a mapping says (stages 1 and 2), or where shapes and the
number of ranks put it (stage 3). Written after the files of DeepSpeed 0.19.8.
"""

from __future__ import annotations

import re
from pathlib import Path

from xtrain.errors import RequestError

from .found import Found
from .stored_flat import FlatGroups, Partitioned
from .stored_whole import Replicated, Stored, Universal, content_of

LATEST = {"deepspeed": "latest", "ds-universal": "latest_universal"}
_DIVIDED = re.compile(r"mp_rank_(?!00_)|^layer_")
"""Files of tensor-parallel ranks but the first, and of pipeline stages."""
_TAG = re.compile(r"\w[\w.-]*")
"""A folder's name, never `..`."""


def open_state(folder: Path, form: str) -> Stored:
    """The checkpoint in `folder`, or the latest of those in it; RequestError when there is none."""
    tag = _tagged(folder, form)
    if form == "ds-universal":
        return Universal(tag)
    if divided := [file for file in tag.glob("*.pt") if _DIVIDED.search(file.name)]:
        raise RequestError(
            f"{divided[0]}: found a model that is divided by tensors or stages, expected data parallelism "
            "alone; make it universal with deepspeed.checkpoint.ds_to_universal, and import that"
        )
    optimizer_files = sorted(tag.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    if not optimizer_files:
        return Replicated(tag)
    ranks = [_optimizer_state(file) for file in optimizer_files]
    return Partitioned(tag, ranks) if "fp32_flat_groups" in ranks[0].value else FlatGroups(tag, ranks)


def _tagged(folder: Path, form: str) -> Path:
    pointer = folder / LATEST[form]
    if not folder.is_dir():
        found = "a file" if folder.exists() else "not there"
        raise RequestError(f"{folder} is {found}; expected a checkpoint of DeepSpeed's, or a folder of them")
    if pointer.is_file():
        tag = pointer.read_text(encoding="utf-8", errors="replace")[:200].strip()
        if not _TAG.fullmatch(tag) or not (folder / tag).is_dir():
            raise RequestError(f"{pointer} names {tag!r}; expected a folder beside it")
        folder = folder / tag
    if (folder / "zero").is_dir() != (form == "ds-universal"):
        found = "a universal checkpoint" if form == "deepspeed" else "no folder `zero`"
        other = "ds-universal" if form == "deepspeed" else "deepspeed"
        raise RequestError(f"{folder}: found {found}; try --from {other}")
    return folder


def _rank_of(file: Path) -> int:
    match = re.search(r"pp_rank_(\d+)", file.name)
    return int(match[1]) if match else 0


def _optimizer_state(file: Path) -> Found:
    state = content_of(file).at("optimizer_state_dict")
    named = state.value.keys() if isinstance(state.value, dict) else set()
    if not {"fp32_flat_groups", "param_slice_mappings"} & named:
        raise RequestError(
            f"{file} has no optimizer state by parameter name: expected stage 1, 2 or 3 of a recent DeepSpeed"
        )
    return state
