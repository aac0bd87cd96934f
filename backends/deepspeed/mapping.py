"""Spec <-> ds_config <-> the hand-written technique: one row for each key of the spec, for docs/deepspeed.md.

Tests hold it against what translate.py and standalone.py really write.
"""

from __future__ import annotations

from typing import NamedTuple

from .zero import BLOCK


class Row(NamedTuple):
    """What one key of the spec becomes."""

    ds_config: tuple[str, ...]
    """Keys that follow from it; those in brackets only in a standalone config."""
    manual: str
    """How the hand-written engine does the same."""


NOT_IN = ()
LOOP = "xtrain's own, on every backend"
MAPPING: dict[str, Row] = {
    "model": Row(NOT_IN, LOOP),
    "model.hidden": Row(
        (
            f"{BLOCK}.reduce_bucket_size",
            f"{BLOCK}.allgather_bucket_size",
            f"{BLOCK}.stage3_prefetch_bucket_size",
            f"{BLOCK}.stage3_param_persistence_threshold",
            f"{BLOCK}.stage3_max_live_parameters",
            f"{BLOCK}.stage3_max_reuse_distance",
            f"{BLOCK}.offload_param.buffer_size",
            f"{BLOCK}.sub_group_size",
        ),
        "one layer at a time, as it stands in the model",
    ),
    "model.vocab_size": Row(
        (f"{BLOCK}.stage3_max_live_parameters", f"{BLOCK}.offload_param.buffer_size"),
        "the logits are made in chunks",
    ),
    "data": Row(NOT_IN, LOOP),
    "batch.global": Row(
        ("train_batch_size", "gradient_accumulation_steps"),
        "N passes, each loss divided by the targets of the global batch; one update",
    ),
    "batch.micro": Row(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "sequences per forward pass"
    ),
    "train.steps": Row(("[scheduler.params.total_num_steps]",), LOOP),
    "train.seed": Row(NOT_IN, LOOP),
    "train.clip": Row(("gradient_clipping",), "global norm over all gradients, one factor (clipping.py)"),
    "train.eval_every": Row(NOT_IN, LOOP),
    "train.compile": Row(NOT_IN, "torch.compile, block by block (xtrain/techniques/compiled.py)"),
    "optimizer.name": Row(("[optimizer.type]",), "torch's AdamW or SGD (optimizer.py)"),
    "optimizer.lr": Row(
        ("[optimizer.params.lr]", "[scheduler.params.warmup_max_lr]"), "set before every update"
    ),
    "optimizer.betas": Row(("[optimizer.params.betas]",), "torch's AdamW"),
    "optimizer.eps": Row(("[optimizer.params.eps]",), "torch's AdamW"),
    "optimizer.weight_decay": Row(
        ("[optimizer.params.weight_decay]",), "a parameter group of matrices, one of the others without decay"
    ),
    "optimizer.momentum": Row(("[optimizer.params.momentum]",), "torch's SGD"),
    "schedule.name": Row(("[scheduler.type]",), "one formula of the update's index (xtrain/schedule.py)"),
    "schedule.warmup": Row(
        ("[optimizer.params.lr]", "[scheduler.params.warmup_num_steps]"), "the same formula"
    ),
    "schedule.warmup_type": Row(("[scheduler.params.warmup_type]",), "the same formula"),
    "schedule.min_ratio": Row(("[scheduler.params.cos_min_ratio]",), "the same formula"),
    "schedule.cycles": Row(NOT_IN, "the same formula; DeepSpeed has none"),
    "schedule.stable": Row(NOT_IN, "the same formula; DeepSpeed has none"),
    "schedule.decay": Row(NOT_IN, "the same formula; DeepSpeed has none"),
    "precision.dtype": Row(
        ("bf16.enabled", "fp16.enabled", "torch_autocast.enabled", "torch_autocast.dtype"),
        "torch.autocast over fp32 weights, or the weights' own format (precision.py)",
    ),
    "precision.weights": Row(
        ("bf16.enabled", "fp16.enabled", "torch_autocast.enabled", "communication_data_type"),
        "16-bit weights with fp32 masters in the optimizer (precision.py)",
    ),
    "precision.loss_scale": Row(("fp16.loss_scale",), "a scaler with DeepSpeed's rules (loss_scaling.py)"),
    "precision.initial_scale_power": Row(("fp16.initial_scale_power",), "the same scaler"),
    "precision.loss_scale_window": Row(("fp16.loss_scale_window",), "the same scaler"),
    "precision.hysteresis": Row(("fp16.hysteresis",), "the same scaler"),
    "precision.min_loss_scale": Row(("fp16.min_loss_scale",), "the same scaler"),
    "memory.checkpointing": Row(NOT_IN, "groups of blocks recomputed in place (xtrain/techniques)"),
    "memory.checkpointing.every": Row(("activation_checkpointing.number_checkpoints",), "blocks per group"),
    "memory.checkpointing.number": Row(("activation_checkpointing.number_checkpoints",), "that many groups"),
    "memory.sharding": Row(
        (f"{BLOCK}.stage",), "one process has nothing to share out; parameters: layers over devices"
    ),
    "memory.offload.optimizer.device": Row(
        (f"{BLOCK}.offload_optimizer.device",), "moments, masters and the update on the CPU"
    ),
    "memory.offload.optimizer.path": Row((f"{BLOCK}.offload_optimizer.nvme_path",), "refused"),
    "memory.offload.gradients": Row(NOT_IN, "each gradient leaves as soon as it is there"),
    "memory.offload.parameters.device": Row(
        (f"{BLOCK}.offload_param.device",),
        "refused: layers over devices instead (memory.sharding: parameters)",
    ),
    "memory.offload.parameters.path": Row((f"{BLOCK}.offload_param.nvme_path",), "refused"),
    "memory.offload.activations": Row(
        ("activation_checkpointing.partition_activations", "activation_checkpointing.cpu_checkpointing"),
        "what checkpointing keeps waits on the CPU",
    ),
    "memory.loss_chunk": Row(NOT_IN, "chunks of tokens, inside the model (xtrain/models/loss.py)"),
    "memory.optimizer_in_backward": Row(
        NOT_IN, "each weight is updated as soon as its gradient is final; on deepspeed refused"
    ),
    "launch": Row(("gradient_accumulation_steps",), "always one process"),
    "checkpoint": Row(NOT_IN, LOOP),
    "stability": Row(NOT_IN, "asked between clipping and update"),
    "log": Row(NOT_IN, LOOP),
    "deepspeed": Row(("any key that says nothing the spec says",), "reported as not used"),
    "manual": Row(NOT_IN, "which layers live where; on deepspeed reported as not used"),
}


def table() -> str:
    """The Markdown table of docs/deepspeed.md."""
    lines = ["| spec | ds_config | manual backends |", "|---|---|---|"]
    for key, row in MAPPING.items():
        keys = "<br>".join(_shown(one) for one in row.ds_config) or "-"
        lines.append(f"| `{key}` | {keys} | {row.manual} |")
    return "\n".join(lines) + "\n"


def _shown(key: str) -> str:
    if " " in key:
        return key
    return f"`{key[1:-1]}` (standalone)" if key.startswith("[") else f"`{key}`"
