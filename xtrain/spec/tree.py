"""The spec as a tree of sections: every key, its type, its default, and what it means.

Nothing here looks at files or at other keys; that is xtrain/spec/check.py. Field descriptions end up
in `xtrain schema`, where editors show them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count: TypeAlias = Annotated[int, Field(ge=1, strict=True)]
Natural: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share: TypeAlias = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Flag: TypeAlias = Annotated[bool, Field(strict=True)]

PRESETS = ("gpt2-nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
PresetName: TypeAlias = Literal["gpt2-nano", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"]


class Section(BaseModel):
    """Unknown keys are errors; a spec never changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class ModelSection(Section):
    """What is trained: one of `preset`, `factory`, `hf`."""

    preset: PresetName | None = None
    factory: str | None = Field(None, description="package.module:function, called with `args`")
    args: dict[str, Any] = Field(default_factory=dict)
    hf: str | None = Field(None, description="Hugging Face model: a name or a local folder")
    trust_remote_code: Flag = False
    layers: Count | None = None
    hidden: Count | None = None
    heads: Count | None = None
    positions: Count | None = Field(None, description="longest context of a preset (1024)")
    vocab_size: Count | None = None
    dropout: Share = 0.0
    blocks: str | None = Field(None, description="path of the block list, where not found")
    init_from: str | None = Field(None, description="checkpoint or Hugging Face folder")


class DataSection(Section):
    """What it is trained on."""

    source: Literal["stdlib", "text", "tokens", "synthetic", "jsonl", "hf"]
    path: str | list[str] | None = Field(None, description="file, list of files, or glob")
    tokenizer: str = "bytes"
    seq_len: Count = 128
    held_out: Share = 0.01
    masked: Share = Field(0.0, description="share of targets without loss (synthetic only)")
    tokens: Count | None = Field(None, description="length of the synthetic text (1,000,000)")


class BatchSection(Section):
    """Sequences per update (`global`) and per forward pass of one process (`micro`)."""

    global_: Count = Field(alias="global")
    micro: Count | None = Field(None, description="default: global")


class TrainSection(Section):
    steps: Count
    seed: Natural = 1234
    clip: Positive | None = Field(1.0, description="global gradient norm; null for none")
    eval_every: Natural = Field(0, description="0: never")
    compile: Flag = False


class AdamW(Section):
    name: Literal["adamw"] = "adamw"
    lr: Positive
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NonNegative = Field(0.1, description="on matrices only")


class SGD(Section):
    name: Literal["sgd"]
    lr: Positive
    momentum: Share = 0.0


class Constant(Section):
    name: Literal["constant"]
    warmup: Natural = 0


class Linear(Section):
    name: Literal["linear"]
    warmup: Natural = 0


class Cosine(Section):
    name: Literal["cosine"] = "cosine"
    warmup: Natural = 0
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    cycles: Positive = Field(0.5, description="0.5: one half wave, from the peak to the floor")


class WSD(Section):
    name: Literal["wsd"]
    warmup: Natural = 0
    stable: Natural
    decay: Count
    min_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0


class WarmupDecay(Section):
    name: Literal["warmup-decay"]
    warmup: Natural = 0
    warmup_type: Literal["linear", "log"] = "log"


Optimizer: TypeAlias = Annotated[AdamW | SGD, Field(discriminator="name")]
Schedule: TypeAlias = Annotated[Constant | Linear | Cosine | WSD | WarmupDecay, Field(discriminator="name")]


class Precision(Section):
    """fp32, bf16 and fp16 are short for {dtype, weights}; `weights` defaults to fp32, for fp16 to fp16.

    The scaler's keys are DeepSpeed's, with its defaults; `loss_scale: 0` is dynamic.
    """

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    weights: Literal["fp32", "bf16", "fp16"] = "fp32"
    loss_scale: NonNegative = 0.0
    initial_scale_power: Natural = 16
    loss_scale_window: Count = 1000
    hysteresis: Count = 2
    min_loss_scale: Positive = 1.0

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

    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    ops: Literal["cheap"] | None = None


class Checkpointing(Section):
    """Activation checkpointing: exactly one of the keys, or all None for none."""

    auto: Flag = False
    every: Count | None = None
    number: Count | None = None
    selective: Selective | None = None

    @model_validator(mode="before")
    @classmethod
    def expand_short_form(cls, value: Any) -> Any:
        return {"none": {}, "auto": {"auto": True}}.get(value, value) if isinstance(value, str) else value

    @property
    def enabled(self) -> bool:
        return self != Checkpointing()


class OffloadTarget(Section):
    """Where something lives instead of on the device."""

    device: Literal["none", "cpu", "nvme"] = "none"
    path: str | None = Field(None, description="folder on the drive, for nvme")

    @model_validator(mode="before")
    @classmethod
    def expand_short_form(cls, value: Any) -> Any:
        return {"device": value} if isinstance(value, str) else value

    @property
    def enabled(self) -> bool:
        return self.device != "none"


class Offload(Section):
    optimizer: OffloadTarget = OffloadTarget()
    gradients: OffloadTarget = OffloadTarget()
    parameters: OffloadTarget = OffloadTarget()
    activations: OffloadTarget = OffloadTarget()


class MemorySection(Section):
    """Techniques that save memory; none of them changes what is learned."""

    checkpointing: Checkpointing = Checkpointing()
    sharding: Literal["none", "optimizer", "gradients", "parameters"] = "none"
    offload: Offload = Offload()
    loss_chunk: Literal["auto", "none"] | Count = Field("auto", description="tokens per chunk")


class Launch(Section):
    processes: Count = 1


class Checkpoint(Section):
    """When to save; always at the end of a run."""

    every_steps: Count | None = None
    every_minutes: Positive | None = None
    keep: Count = 3
    best: Flag = Field(False, description="also keep the one with the lowest eval_loss")
    background: Flag = Field(True, description="write while training goes on")
    on_error: Literal["continue", "stop"] = "continue"


class Stability(Section):
    """Guards: a step that trips one is skipped on every rank; NaN and inf always are."""

    loss_spike: Positive | None = Field(None, description="x the mean of the last window losses")
    window: Count = 100
    grad_norm: Positive | None = None
    stop_after: Count | None = Field(None, description="skips in a row that end the run")


class Log(Section):
    every_steps: Count = 10
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)


class Manual(Section):
    """For the manual backends only."""

    devices: list[str] | None = Field(None, description="layers over devices, e.g. [main, cpu]")
    split: Literal["auto"] | list[Count] | list[Share] = "auto"


class Spec(Section):
    """One training run, whatever the backend."""

    model: ModelSection
    data: DataSection
    batch: BatchSection
    train: TrainSection
    optimizer: Optimizer
    schedule: Schedule = Cosine()
    precision: Precision = Precision()
    memory: MemorySection | Literal["auto"] = MemorySection()
    launch: Launch = Launch()
    checkpoint: Checkpoint = Checkpoint()
    stability: Stability | None = None
    log: Log = Log()
    deepspeed: dict[str, Any] | None = None
    manual: Manual | None = None

    @field_validator("optimizer", "schedule", mode="before")
    @classmethod
    def expand_short_form(cls, value: Any, info: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        default = {"optimizer": "adamw", "schedule": "cosine"}[info.field_name]
        return {"name": default, **value} if isinstance(value, dict) else value

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
