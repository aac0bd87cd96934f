"""The field's simple memory estimates, as people quote them: `xtrain plan --formula NAME`.

Bytes per parameter and a factor for activations, nothing of this machine or model. They differ in what they
count, so each says what that is. Gigabytes are 10^9 bytes, as in the sources, unless a title says GiB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from xtrain.contract import JSON

Unit = Literal["GB", "GiB"]

FP32, HALF = 4, 2
"""Bytes per number."""
ADAM_MOMENTS = 2 * FP32
"""Bytes per parameter of exp_avg and exp_avg_sq."""
ACTIVATION_FACTOR = 10
"""Tensors of batch x seq x hidden that the simple estimate counts per layer."""
PAPER_K = 12
"""Bytes per parameter of the optimizer: fp32 master, exp_avg, exp_avg_sq (Rajbhandari et al. 2020, 3.1)."""


@dataclass(frozen=True)
class Sizes:
    """What an estimate is made for."""

    params: float
    gpus: int = 1
    batch: int = 4
    seq: int = 2048
    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    bytes: int = HALF
    """Of a number in 16-bit or 32-bit training."""


@dataclass(frozen=True)
class Estimate:
    """A table for people, with the figures in bytes beside it for programs."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    unit: Unit = "GB"
    notes: Sequence[str] = ()

    def as_json(self) -> dict[str, JSON]:
        """Figures in bytes."""
        rows: dict[str, JSON] = {
            name: dict(zip(self.columns, row, strict=True)) for name, row in self.rows.items()
        }
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}


def simple(sizes: Sizes) -> Estimate:
    """Parameters and gradients at `bytes` each, Adam 8 or SGD's momentum 4, ten tensors per layer."""
    p, one = sizes.params, sizes.bytes
    activations = sizes.batch * sizes.seq * sizes.hidden * one * ACTIVATION_FACTOR * sizes.layers
    adam = [p * one, p * one, p * ADAM_MOMENTS, activations]
    sgd = [p * one, p * one, p * FP32, activations]
    return Estimate(
        "the simple estimate",
        ("parameters", "gradients", "optimizer", "activations", "total"),
        {"Adam": with_total(adam), "SGD with momentum": with_total(sgd)},
        notes=(
            f"activations: batch x seq x hidden x {one} bytes x {ACTIVATION_FACTOR} x layers; "
            "logits, master weights and the allocator's slack are not counted",
        ),
    )


def master(sizes: Sizes) -> Estimate:
    """16-bit weights with an fp32 master copy, fp32 gradients, Adam: 18 bytes per parameter."""
    p = sizes.params
    parts = [p * HALF, p * FP32, p * FP32, p * FP32, p * FP32]
    return Estimate(
        "mixed precision with a master copy",
        ("parameters", "master", "exp_avg", "exp_avg_sq", "gradients", "total"),
        {"Adam": with_total(parts)},
        notes=("without activations",),
    )


def half(sizes: Sizes) -> Estimate:
    """Everything in 16 bits: N bytes of parameters, N of gradients, 2N of moments."""
    n = sizes.params * HALF
    return Estimate(
        "pure 16-bit training",
        ("parameters", "gradients", "optimizer", "total"),
        {"Adam": with_total([n, n, 2 * n])},
        unit="GiB",
        notes=(
            "4N, N being the bytes of the loaded model; without activations",
            "a calculator says 2.37 and 9.49 GiB for a model of 1.27e9 parameters; measured were 2.599 "
            "loaded, and in training 10.586 (batch 4) and 10.29 (batch 16, checkpointing)",
        ),
    )


def zero(sizes: Sizes) -> Estimate:
    """ZeRO per GPU: bf16 parameters, fp32 gradients, fp32 moments (no master copy counted)."""
    p, n = sizes.params, sizes.gpus
    parts = {"parameters": p * HALF, "gradients": p * FP32, "optimizer": p * ADAM_MOMENTS}
    rows = {
        stage: with_total([held / n if name in split else held for name, held in parts.items()])
        for stage, split in SPLIT.items()
    }
    plain = rows["DDP"][-1]
    here = ", ".join(f"{stage} {plain / row[-1]:.3g}x" for stage, row in rows.items() if stage != "DDP")
    return Estimate(
        f"ZeRO on {n} GPUs",
        (*parts, "per GPU", "all GPUs"),
        {stage: [*row, row[-1] * n] for stage, row in rows.items()},
        notes=(
            f"less memory than DDP: {here} (the slogans say 4x, 8x and {n}x)",
            "bf16 parameters, fp32 gradients and moments; without activations",
        ),
    )


SPLIT: dict[str, tuple[str, ...]] = {
    "DDP": (),
    "ZeRO-1": ("optimizer",),
    "ZeRO-2": ("optimizer", "gradients"),
    "ZeRO-3": ("optimizer", "gradients", "parameters"),
}
"""What each stage divides over the GPUs (Rajbhandari et al. 2020, figure 1)."""


def paper(sizes: Sizes) -> Estimate:
    """ZeRO as its paper counts: (2 + 2 + 12) bytes per parameter."""
    p, n = sizes.params, sizes.gpus
    parts = {"parameters": p * HALF, "gradients": p * HALF, "optimizer": p * PAPER_K}
    rows = {
        stage: with_total([held / n if name in split else held for name, held in parts.items()])
        for stage, split in SPLIT.items()
    }
    return Estimate(
        f"the ZeRO paper's table on {n} GPUs, K = {PAPER_K}",
        (*parts, "per GPU"),
        rows,
        notes=("16-bit parameters and gradients; the optimizer is the fp32 master copy and both moments",),
    )


VOLUMES = {"DDP": 2, "ZeRO-1": 2, "ZeRO-2": 2, "ZeRO-3": 3}
"""Numbers sent per parameter, step and GPU (Rajbhandari et al. 2020, section 7)."""


def communication(sizes: Sizes) -> Estimate:
    """What each GPU sends per step, as the ZeRO paper counts (section 7)."""
    return Estimate(
        "sent per GPU and step",
        ("volume",),
        {f"{name}, {count} P": [count * sizes.params * sizes.bytes] for name, count in VOLUMES.items()},
        notes=(
            f"P: the number of parameters, {sizes.bytes} bytes each; without accumulation",
            "reduce-scatter and all-gather are P each; ZeRO-3 gathers twice (forward and backward). "
            "Some count 4 P for ZeRO-3: a gather for each pass and an all-reduce counted as two",
        ),
    )


def activations(sizes: Sizes) -> Estimate:
    """Three counts of the same activations, and what each counts."""
    s, b, h, layers = sizes.seq, sizes.batch, sizes.hidden, sizes.layers
    plain = b * s * h * layers * sizes.bytes
    layer = s * b * h * (34 + 5 * sizes.heads * s / h)
    fused = s * b * h * 34
    return Estimate(
        "activations, counted in four ways",
        ("all layers",),
        {
            "one tensor per layer": [plain],
            f"{ACTIVATION_FACTOR} tensors per layer": [plain * ACTIVATION_FACTOR],
            "a real layer, attention matrix kept": [layer * layers],
            "a real layer, fused attention": [fused * layers],
        },
        notes=(
            "one tensor per layer is what activation checkpointing of every block keeps",
            "a real layer: s b h (34 + 5 a s / h) bytes at 16 bits (Korthikanti et al. 2022, eq. 1), which "
            "includes dropout masks; fused attention never stores the second term",
        ),
    )


def parallel(sizes: Sizes) -> Estimate:
    """Parameters per GPU under tensor and pipeline parallelism, by arithmetic, beside what is claimed."""
    whole = sizes.params * HALF
    rows = {
        f"TP{tp} x PP{pp} x SP{sp}": [whole / (tp * pp), *(gb * 1e9 for gb in with_total(claimed))]
        for (tp, pp, sp), claimed in CLAIMED_GB.items()
    }
    return Estimate(
        "parameters per GPU, 16 bits, beside what is claimed for 7B on 8 GPUs at 4K tokens",
        ("computed", "claimed", "and activations", "together"),
        rows,
        notes=(
            "tensor and pipeline parallelism divide the parameters; sequence and data parallelism do not",
            "no formula gives the claimed parameters: they are divided by 4 or by 2 where the model is "
            "divided by 8 or 4. The claimed activations are 28 GB over 1, 4, 8 and 16",
        ),
    )


CLAIMED_GB = {
    (1, 1, 1): (14.0, 28.0),
    (4, 2, 1): (3.5, 7.0),
    (2, 4, 1): (7.0, 3.5),
    (2, 2, 2): (7.0, 1.75),
}
"""Parameters and activations per GPU, by (tensor, pipeline, sequence) degrees, as they are quoted."""


def with_total(parts: Sequence[float]) -> list[float]:
    return [*parts, sum(parts)]


FORMULAS: dict[str, Callable[[Sizes], Estimate]] = {
    "simple": simple,
    "master": master,
    "half": half,
    "zero": zero,
    "paper": paper,
    "activations": activations,
    "communication": communication,
    "parallel": parallel,
}
