"""`xtrain plan --advise`: how to divide a training over a cluster, with the arithmetic that decides.

Rules, in the order in which they are asked, each the field's own reason:

1. *Sequence*: where attention is a good part of the work, sequences are long enough to be divided
   themselves (Ulysses, ring attention), and fused attention must be used.
2. *Data*: where one node holds a whole replica of the training state under ZeRO-3, shard the state over the
   data-parallel ranks and stop there: its gathers stay inside the node's fast links.
3. *Tensor and pipeline*: otherwise gathers would cross the slow links between nodes at every layer, so the
   model itself is divided, as little as fits: by tensors inside a node as long as each part keeps wide
   matrix products, the rest by pipeline stages, between which only activations travel. The first stage holds
   the activations of as many micro-batches as there are stages: under 1F1B each starts as many forward passes
   as stages follow it, and one, before its first backward pass (Narayanan et al. 2021, arXiv 2104.04473,
   section 2.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xtrain.contract import JSON
from xtrain.errors import RequestError
from xtrain.spec.nearest import divisors

STATE_BYTES = 16
"""Per parameter in mixed precision: 2 weights, 2 gradients, 12 master copy and moments (ZeRO paper, 3.1)."""
WORKING_BYTES = 4
"""Of these, what every pass needs whole: weights and gradients. The other 12 are ZeRO-1's to shard."""
USABLE = 0.8
"""Share of a device left to states and activations; the rest is buffers, fragments and the runtime."""
ATTENTION_BOUND = 0.2
"""Share of attention's own products in all the work from which a sequence is called long."""
TOKENS_PER_RANK = 4096
"""Of one sequence, on one GPU, when sequences are divided."""
WIDTH_PER_RANK = 2048
"""Columns of the hidden width that a tensor-parallel rank should keep: narrower products are slow."""
HALF = 2


@dataclass(frozen=True)
class Cluster:
    """Alike devices in alike nodes."""

    nodes: int
    gpus_per_node: int
    device_bytes: float

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Shape:
    """A transformer and the sequences it is trained on."""

    params: float
    layers: int
    hidden: int
    seq: int
    batch: int
    """Sequences per micro-batch and replica."""

    @property
    def attention_share(self) -> float:
        """Of all products: 12 L H T of 6 N + 12 L H T per token (Chowdhery et al. 2022, appendix B)."""
        attention = 12 * self.layers * self.hidden * self.seq
        return attention / (6 * self.params + attention)

    @property
    def layer_bytes(self) -> float:
        """Activations of one tensor [batch, seq, hidden] in 16 bits."""
        return self.batch * self.seq * self.hidden * HALF

    @property
    def kept_bytes(self) -> float:
        """Checkpointed activations of one micro-batch: each layer's input."""
        return self.layers * self.layer_bytes

    @property
    def state_bytes(self) -> float:
        return self.params * STATE_BYTES


@dataclass(frozen=True)
class Advice:
    data: int
    tensor: int
    pipeline: int
    sequence: int
    zero: str
    """What the data-parallel ranks shard."""
    reasons: Sequence[str]
    figures: Mapping[str, str]

    @property
    def degrees(self) -> str:
        named = (("TP", self.tensor), ("PP", self.pipeline), ("SP", self.sequence), ("DP", self.data))
        return " x ".join(f"{name} {degree}" for name, degree in named if degree > 1) or "one GPU"

    def as_json(self) -> dict[str, JSON]:
        return {
            "data": self.data,
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "sequence": self.sequence,
            "zero": self.zero,
            "reasons": list(self.reasons),
            "figures": dict(self.figures),
        }


def advise(shape: Shape, cluster: Cluster, micro_batches: int = 8) -> Advice:
    """Degrees whose product is the number of GPUs. RequestError where no division fits."""
    sequence, about_sequence = _sequence_degree(shape, cluster)
    tensor, pipeline, about_model = _model_degrees(shape, cluster, sequence, micro_batches)
    data = cluster.gpus // (tensor * pipeline * sequence)
    divided = tensor * pipeline > 1
    zero = ("ZeRO-1" if divided else "ZeRO-3 (FSDP)") if data * sequence > 1 else "none"
    return Advice(
        data,
        tensor,
        pipeline,
        sequence,
        zero,
        [about_sequence, *about_model],
        _figures(shape, cluster, data, tensor, pipeline, sequence, micro_batches),
    )


def _sequence_degree(shape: Shape, cluster: Cluster) -> tuple[int, str]:
    share = f"attention is {shape.attention_share:.0%} of the work at {shape.seq:,} tokens"
    if shape.attention_share < ATTENTION_BOUND:
        return 1, f"{share}, below {ATTENTION_BOUND:.0%}: sequences stay whole"
    degree = 1
    while cluster.gpus_per_node % (2 * degree) == 0 and shape.seq / degree > TOKENS_PER_RANK:
        degree *= 2
    return degree, (
        f"{share}: use fused attention, and divide each sequence over {degree} GPUs of a node, "
        f"{shape.seq // degree:,} tokens each"
    )


def _model_degrees(
    shape: Shape, cluster: Cluster, sequence: int, micro_batches: int
) -> tuple[int, int, list[str]]:
    room, kept = USABLE * cluster.device_bytes, shape.kept_bytes / sequence
    per_gpu = shape.state_bytes / min(cluster.gpus_per_node, cluster.gpus)
    whole = f"the training state is {_gb(shape.state_bytes)} ({STATE_BYTES} bytes per parameter)"
    if per_gpu + kept <= room:
        room_of_one = _gb(cluster.device_bytes)
        if cluster.gpus == 1:
            return 1, 1, [f"{whole}; one GPU of {room_of_one} holds it"]
        over = f"one node holds it, {_gb(per_gpu)} per GPU of {room_of_one}"
        return 1, 1, [f"{whole}; {over}: shard it over the data-parallel ranks"]
    for degree in divisors(cluster.gpus // sequence):
        tensor, pipeline = _split(degree, shape, cluster.gpus_per_node // sequence)
        flying = min(pipeline, micro_batches)
        per_gpu_held = {
            "of weights and gradients": shape.params * WORKING_BYTES / degree,
            "of optimizer (ZeRO-1)": shape.params * (STATE_BYTES - WORKING_BYTES) / cluster.gpus,
            f"of checkpointed activations (micro-batches in flight: {flying})": flying * kept / degree,
        }
        if pipeline <= shape.layers and sum(per_gpu_held.values()) <= room:
            why = f"{whole}: {_too_much(cluster, per_gpu > room, kept)}: the model itself is divided"
            held = ", ".join(f"{_gb(count)} {what}" for what, count in per_gpu_held.items())
            return tensor, pipeline, [why, *_divided(shape, degree, held, tensor, pipeline)]
    raise RequestError(
        f"--advise: {shape.params:g} parameters do not fit on {cluster.gpus} GPUs of "
        f"{_gb(cluster.device_bytes)} however they are divided; use more GPUs, or offload"
    )


def _too_much(cluster: Cluster, is_state: bool, kept: float) -> str:
    """Why a node does not do: for the state, or for the activations beside it."""
    if is_state:
        node = _gb(cluster.device_bytes * cluster.gpus_per_node)
        return f"more than a node of {node} can hold, and gathering it across nodes at every layer is slow"
    return f"a node can hold it, but not beside {_gb(kept)} of checkpointed activations on every GPU"


def _divided(shape: Shape, degree: int, held: str, tensor: int, pipeline: int) -> list[str]:
    return [
        f"by {degree}, the least that fits: per GPU {held}",
        f"by tensors {tensor} (inside a node, {shape.hidden // tensor:,} columns each; narrower "
        f"than {WIDTH_PER_RANK:,} is slow), by pipeline stages {pipeline}",
    ]


def _split(degree: int, shape: Shape, of_a_node: int) -> tuple[int, int]:
    """(tensor, pipeline) whose product is `degree`: the widest tensor degree that keeps products wide.

    It divides `of_a_node`, the GPUs of a node that are left: no group reaches into another node.
    """
    widest = max(1, shape.hidden // WIDTH_PER_RANK)
    tensor = max(d for d in divisors(degree) if of_a_node % d == 0 and d <= widest)
    return tensor, degree // tensor


def _figures(
    shape: Shape, cluster: Cluster, data: int, tensor: int, pipeline: int, sequence: int, micro_batches: int
) -> dict[str, str]:
    weights = shape.params * HALF / (tensor * pipeline)
    figures = {
        "weights per GPU, 16 bits": _gb(weights if tensor * pipeline > 1 else weights / (data * sequence)),
        "optimizer per GPU": _gb(shape.params * (STATE_BYTES - WORKING_BYTES) / cluster.gpus),
    }
    if data > 1:
        divided = tensor * pipeline > 1
        sent = "2 x {} (reduce-scatter, all-gather)" if divided else "3 x {} (two gathers, one reduce)"
        figures["data parallel, sent per step and GPU"] = sent.format(_gb(weights))
    if tensor > 1:
        per_layer = 4 * shape.layer_bytes / sequence
        figures["tensor parallel, all-reduced per micro-batch"] = (
            f"{_gb(per_layer * shape.layers / pipeline)} (4 x batch x seq x hidden per layer)"
        )
    if pipeline > 1:
        bubble = (pipeline - 1) / (micro_batches + pipeline - 1)
        figures["pipeline, sent per boundary and micro-batch"] = _gb(2 * shape.layer_bytes / sequence)
        figures[f"pipeline bubble, {micro_batches} micro-batches"] = f"{bubble:.0%} ((p - 1) / (m + p - 1))"
    if sequence > 1:
        figures["sequence parallel, all-to-all per layer"] = (
            f"{_gb(8 * shape.layer_bytes / sequence)} (query, key, value, output; both ways)"
        )
    return figures


def _gb(count: float) -> str:
    """Bytes; MB where GB would say 0.0."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
