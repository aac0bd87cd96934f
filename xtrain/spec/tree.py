"""The spec as a tree of sections: every key, its type, its default, and what it means.

Nothing here looks at files or at other keys; that is xtrain/spec/check.py. Field descriptions end up
in `xtrain schema`, where editors show them, and in docs/spec.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LARGEST = 2**63 - 1
"""Of whole numbers: what the libraries below can count to."""
Count: TypeAlias = Annotated[int, Field(ge=1, le=LARGEST, strict=True)]
Natural: TypeAlias = Annotated[int, Field(ge=0, le=LARGEST, strict=True)]
Positive: TypeAlias = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)]
Ratio: TypeAlias = Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)]
Flag: TypeAlias = Annotated[bool, Field(strict=True)]

PRESETS = ("gpt2-nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PresetName: TypeAlias = Literal["gpt2-nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]

STAGES = ("none", "optimizer", "gradients", "parameters")
"""Of memory.sharding, each including those before it: ZeRO 0 to 3."""
Sharding: TypeAlias = Literal["none", "optimizer", "gradients", "parameters"]


def words(*short_forms: str) -> Callable[[dict[str, Any]], None]:
    """Adds to a JSON Schema the words that may stand for the whole section."""

    def extend(schema: dict[str, Any]) -> None:
        whole = {
            key: schema.pop(key) for key in list(schema) if key not in ("description", "default", "title")
        }
        schema["anyOf"] = [{"enum": list(short_forms)}, whole]

    return extend


class Section(BaseModel):
    """Unknown keys are errors; a spec never changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """What is trained: one of `preset`, `factory`, `hf`."""

    preset: PresetName | None = Field(None, description="built-in model")
    factory: str | None = Field(None, description="package.module:function that returns the model")
    args: dict[str, Any] = Field({}, description="keyword arguments of `factory`")
    hf: str | None = Field(None, description="Hugging Face model: a name or a local folder")
    trust_remote_code: Flag = Field(False, description="let an `hf` model run its own code")
    layers: Count | None = Field(None, description="blocks; the preset's own otherwise")
    hidden: Count | None = Field(None, description="width; the preset's own otherwise")
    heads: Count | None = Field(None, description="attention heads; the preset's own otherwise")
    positions: Count | None = Field(None, description="longest context of a preset; 1024 otherwise")
    vocab_size: Count | None = Field(
        None, description="the tokenizer's otherwise (gpt2-nano, factory, hf), or 50257 (other presets)"
    )
    dropout: Share = Field(0.0, description="above 0, curves of two backends agree only statistically")
    blocks: str | None = Field(None, description="path of the list of blocks, where it cannot be found")
    init_from: str | None = Field(None, description="checkpoint or Hugging Face folder to start from")


class DataSection(Section):
    """What it is trained on."""

    source: Literal["stdlib", "text", "tokens", "synthetic", "jsonl", "hf"] = Field(
        description="stdlib: Python's own sources; synthetic: a formula, the same everywhere"
    )
    path: str | list[str] | None = Field(None, description="file, list of files, or glob")
    tokenizer: str = Field("bytes", description="bytes, or a Hugging Face tokenizer's name or folder")
    seq_len: Count = Field(128, description="tokens per sequence")
    held_out: Share = Field(0.01, description="share kept for evaluation")
    masked: Share = Field(0.0, description="share of targets without loss (synthetic only)")
    tokens: Count | None = Field(None, description="length of the synthetic text; 1,000,000 otherwise")


class BatchSection(Section):
    """Sequences per update (`global`) and per forward pass of one process (`micro`)."""

    global_: Count = Field(alias="global", description="sequences per update, over all processes")
    micro: Count | None = Field(
        None, description="sequences per forward pass of one process; `global` otherwise"
    )


class TrainSection(Section):
    """How long, from which seed, and what surrounds an update."""

    steps: Count = Field(description="updates")
    seed: Natural = Field(1234, description="of initial weights, order of data, dropout")
    clip: Positive | None = Field(1.0, description="global gradient norm; null for none")
    eval_every: Natural = Field(0, description="updates between evaluations; 0 for never")
    compile: Flag = Field(False, description="compile blocks and loss with torch.compile")


class AdamW(Section):
    """Adam with decoupled weight decay."""

    name: Literal["adamw"] = Field("adamw", description="which optimizer")
    lr: Positive = Field(description="peak learning rate")
    betas: tuple[Share, Share] = Field((0.9, 0.95), description="decay of the two moments")
    eps: Positive = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegative = Field(0.1, description="on matrices only")


class SGD(Section):
    """Stochastic gradient descent."""

    name: Literal["sgd"] = Field(description="which optimizer")
    lr: Positive = Field(description="peak learning rate")
    momentum: Share = Field(0.0, description="decay of the momentum; 0 for none")


WARMUP = "updates with a rising learning rate; the first has 0"
MIN_RATIO = "the floor, as a share of the peak"


class Constant(Section):
    """The peak, after the warm-up."""

    name: Literal["constant"] = Field(description="shape of the learning rate")
    warmup: Natural = Field(0, description=WARMUP)


class Linear(Section):
    """Down to 0 in a line."""

    name: Literal["linear"] = Field(description="shape of the learning rate")
    warmup: Natural = Field(0, description=WARMUP)


class Cosine(Section):
    """Down to the floor in half a wave."""

    name: Literal["cosine"] = Field("cosine", description="shape of the learning rate")
    warmup: Natural = Field(0, description=WARMUP)
    min_ratio: Ratio = Field(0.1, description=MIN_RATIO)
    cycles: Positive = Field(0.5, description="0.5: one half wave, from the peak to the floor")


class WSD(Section):
    """Warm up, stay, decay."""

    name: Literal["wsd"] = Field(description="shape of the learning rate")
    warmup: Natural = Field(0, description=WARMUP)
    stable: Natural = Field(description="updates at the peak")
    decay: Count = Field(description="updates from the peak down to the floor")
    min_ratio: Ratio = Field(0.0, description=MIN_RATIO)


class WarmupDecay(Section):
    """DeepSpeed's WarmupDecayLR."""

    name: Literal["warmup-decay"] = Field(description="shape of the learning rate")
    warmup: Natural = Field(0, description=WARMUP)
    warmup_type: Literal["linear", "log"] = Field("log", description="shape of the warm-up")


Optimizer: TypeAlias = Annotated[AdamW | SGD, Field(discriminator="name")]
Schedule: TypeAlias = Annotated[Constant | Linear | Cosine | WSD | WarmupDecay, Field(discriminator="name")]


class Precision(Section):
    """fp32, bf16 and fp16 are short for {dtype, weights}; `weights` defaults to fp32, for fp16 to fp16.

    The scaler's keys are DeepSpeed's, with its defaults; `loss_scale: 0` is dynamic.
    """

    model_config = ConfigDict(json_schema_extra=words("fp32", "bf16", "fp16"))

    dtype: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="of forward and backward")
    weights: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of the weights outside the optimizer; fp16 with dtype fp16"
    )
    loss_scale: NonNegative = Field(0.0, description="fixed loss scale; 0 for a dynamic one (fp16)")
    initial_scale_power: Annotated[int, Field(ge=0, le=127, strict=True)] = Field(
        16, description="the dynamic scale starts at 2 to this power"
    )
    loss_scale_window: Count = Field(1000, description="updates without overflow before the scale doubles")
    hysteresis: Count = Field(2, description="overflows before the scale halves")
    min_loss_scale: Positive = Field(1.0, description="the dynamic scale's floor")

    @model_validator(mode="before")
    @classmethod
    def expand_short_form(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"dtype": value}
        if isinstance(value, dict) and "weights" not in value and value.get("dtype") == "fp16":
            value = {**value, "weights": "fp16"}
        return value


class Selective(Section):
    """Recompute only a share of the blocks, or only the cheap operations."""

    ratio: Annotated[float, Field(gt=0, le=1, strict=True)] | None = Field(
        None, description="recompute this share of the blocks, the first ones"
    )
    ops: Literal["cheap"] | None = Field(None, description="cheap: all but matrix products and attention")


class Checkpointing(Section):
    """Activation checkpointing: exactly one of the keys, or all None for none."""

    model_config = ConfigDict(json_schema_extra=words("none", "auto"))

    auto: Flag = Field(False, description="as many groups as the square root of the number of blocks")
    every: Count | None = Field(None, description="blocks per group")
    number: Count | None = Field(None, description="groups")
    selective: Selective | None = Field(None, description="recompute only a part")

    @model_validator(mode="before")
    @classmethod
    def expand_short_form(cls, value: Any) -> Any:
        return {"none": {}, "auto": {"auto": True}}.get(value, value) if isinstance(value, str) else value

    @property
    def enabled(self) -> bool:
        return self != Checkpointing()


class OffloadTarget(Section):
    """Where something lives instead of on the device."""

    model_config = ConfigDict(json_schema_extra=words("none", "cpu", "nvme"))

    device: Literal["none", "cpu", "nvme"] = Field(
        "none", description="where to; none keeps it on the device"
    )
    path: str | None = Field(None, description="folder on the drive, for nvme")

    @model_validator(mode="before")
    @classmethod
    def expand_short_form(cls, value: Any) -> Any:
        return {"device": value} if isinstance(value, str) else value

    @property
    def enabled(self) -> bool:
        return self.device != "none"


class Offload(Section):
    """What lives outside the device: none, cpu, or nvme with a path."""

    optimizer: OffloadTarget = Field(OffloadTarget(), description="the optimizer's moments, and its update")
    gradients: OffloadTarget = Field(OffloadTarget(), description="gradients between backward and update")
    parameters: OffloadTarget = Field(OffloadTarget(), description="weights that are not in use")
    activations: OffloadTarget = Field(OffloadTarget(), description="what checkpointing keeps")


class MemorySection(Section):
    """Techniques that save memory; none of them changes what is learned."""

    checkpointing: Checkpointing = Field(
        Checkpointing(), description="recompute activations in the backward pass"
    )
    sharding: Sharding = Field("none", description="ZeRO-1, 2, 3; each includes the one before")
    offload: Offload = Field(Offload(), description="what lives outside the device")
    optimizer_in_backward: Flag = Field(
        False, description="update each weight in the backward pass, as soon as its gradient is final"
    )
    loss_chunk: Literal["auto", "none"] | Count = Field(
        "auto", description="tokens per chunk of the loss, so that the full logits never exist"
    )


class Launch(Section):
    """How many processes."""

    processes: Count = Field(1, description="`--nproc` overrides it")
    hang_minutes: Positive | None = Field(
        30.0, description="a process that makes no step for so long is ended, and says where it stood"
    )
    grace_seconds: Positive | None = Field(
        None, description="a process that was asked to stop and has not saved for so long leaves all the same"
    )


class Checkpoint(Section):
    """When to save; always at the end of a run."""

    every_steps: Count | None = Field(None, description="updates between checkpoints")
    every_minutes: Positive | None = Field(None, description="minutes between checkpoints")
    keep: Count = Field(3, description="how many of the latest stay")
    best: Flag = Field(False, description="also keep the one with the lowest eval_loss")
    background: Flag = Field(False, description="write while training goes on")
    on_error: Literal["continue", "stop"] = Field("continue", description="when one cannot be written")


class Stability(Section):
    """Guards: a step that trips one is skipped on every rank; NaN and inf always are."""

    loss_spike: Positive | None = Field(None, description="x the mean of the last `window` unskipped losses")
    window: Count = Field(100, description="losses in that mean; no verdict before it is full")
    grad_norm: Positive | None = Field(None, description="largest global gradient norm, before clipping")
    stop_after: Count | None = Field(None, description="skips in a row that end the run")


class Log(Section):
    """What is said of a run."""

    every_steps: Count = Field(10, description="updates per logging window")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(
        [], description="services that get the metrics too"
    )


class Manual(Section):
    """For the manual backends only."""

    devices: list[str] | None = Field(None, description="layers over devices, e.g. [main, cpu]")
    split: Literal["auto"] | list[Count] | list[Share] = Field(
        "auto", description="layers per device, or shares of them"
    )


class Spec(Section):
    """One training run, whatever the backend."""

    model: ModelSection = Field(description="what is trained: one of `preset`, `factory`, `hf`")
    data: DataSection = Field(description="what it is trained on")
    batch: BatchSection = Field(description="sequences per update and per forward pass")
    train: TrainSection = Field(description="how long, from which seed, and what surrounds an update")
    optimizer: Optimizer = Field(description="how weights follow gradients")
    schedule: Schedule = Field(
        Cosine(),
        description="how the learning rate changes",
        json_schema_extra=words("constant", "linear", "cosine", "warmup-decay"),
    )
    precision: Precision = Field(Precision(), description="number formats")
    memory: MemorySection | Literal["auto"] = Field(
        MemorySection(), description="techniques that save memory; auto: the planner chooses"
    )
    launch: Launch = Field(Launch(), description="how many processes, and how long to wait for them")
    checkpoint: Checkpoint = Field(Checkpoint(), description="when to save; always at the end of a run")
    stability: Stability | None = Field(None, description="guards that skip an update")
    log: Log = Field(Log(), description="what is said of a run")
    deepspeed: dict[str, Any] | None = Field(
        None, description="merged into the ds_config last; DeepSpeed only"
    )
    manual: Manual | None = Field(None, description="for the manual backends only")

    @field_validator("optimizer", "schedule", mode="before")
    @classmethod
    def expand_short_form(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        default = {"optimizer": "adamw", "schedule": "cosine"}[info.field_name]
        return {"name": default, **value} if isinstance(value, dict) else value

    @property
    def techniques(self) -> MemorySection:
        """Those of `memory`; none under `auto`, as long as the planner has not chosen."""
        return MemorySection() if self.memory == "auto" else self.memory

    @property
    def micro_batch(self) -> int:
        """Sequences per forward pass of one process."""
        return self.batch.micro if self.batch.micro is not None else self.batch.global_

    def accumulation(self, data_size: int) -> int:
        """Micro-batches per update and process; raises ValueError where they do not divide."""
        per_pass = self.micro_batch * data_size
        if self.batch.global_ % per_pass:
            raise ValueError(f"batch.global {self.batch.global_} is not a multiple of {per_pass}")
        return self.batch.global_ // per_pass
