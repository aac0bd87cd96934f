"""What `benchmarks/plan_accuracy.py` sweeps: models, shapes of batch, techniques, lanes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from xtrain.spec.tree import Spec

BF16_WEIGHTS = {"dtype": "bf16", "weights": "bf16"}
PRECISIONS = ("fp32", "bf16", BF16_WEIGHTS)
FP16 = {"dtype": "fp16", "weights": "fp16"}
FP16_AUTOCAST = {"dtype": "fp16", "weights": "fp32"}
RECOMPUTED = (
    "auto",
    {"every": 1},
    {"every": 3},
    {"number": 3},
    {"selective": {"ratio": 0.5}},
    {"selective": {"ops": "cheap"}},
)
STATE = {"optimizer": "cpu", "gradients": "cpu"}
HALVES = {"devices": ["main", "cpu"], "split": [0.5, 0.5]}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 1000,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SIMULATED = "simulated"
"""The hand-written engine on tests/simulated's accelerator, whose tensors cannot be the host's."""


@dataclass(frozen=True)
class Case:
    backend: str = "cpu"
    world: int = 1
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    seq_len: int = 128
    micro: int = 4
    accumulation: int = 2
    vocab_size: int = 257
    dropout: float = 0.0
    hf: Any = None
    """Changes to LLAMA; None for the built-in GPT-2."""
    precision: Any = "fp32"
    checkpointing: Any = "none"
    loss_chunk: Any = "auto"
    sharding: str = "none"
    offload: dict[str, str] = field(default_factory=dict)
    manual: Any = None
    in_backward: bool = False

    def spec(self, folder: Path | None = None) -> Spec:
        """`folder` is where the config of a Hugging Face model is written."""
        return Spec.model_validate(
            {
                "model": self._model(folder),
                "data": {"source": "synthetic", "seq_len": self.seq_len, "tokens": 200_000},
                "batch": {"global": self.micro * self.accumulation * self.world, "micro": self.micro},
                "train": {"steps": 4, "clip": None if self.in_backward else 1.0},
                "optimizer": {"name": "adamw", "lr": 1e-3},
                "precision": self.precision,
                "memory": {
                    "checkpointing": self.checkpointing,
                    "loss_chunk": self.loss_chunk,
                    "sharding": self.sharding,
                    "offload": self.offload,
                    "optimizer_in_backward": self.in_backward,
                },
                "manual": self.manual,
            }
        )

    def _model(self, folder: Path | None) -> dict[str, Any]:
        if self.hf is None:
            return {
                "preset": "gpt2-nano",
                "layers": self.layers,
                "hidden": self.hidden,
                "heads": self.heads,
                "vocab_size": self.vocab_size,
                "dropout": self.dropout,
            }
        assert folder is not None, "a Hugging Face model needs a folder for its config"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**LLAMA, **self.hf}))
        return {"hf": str(folder), "dropout": self.dropout}

    def __str__(self) -> str:
        changed = {k: v for k, v in asdict(self).items() if v != getattr(Case(), k)}
        return ", ".join(f"{k} {json.dumps(v)}" for k, v in changed.items()) or "default"


GPT2_124M = Case(layers=12, hidden=768, heads=12, vocab_size=50_257, seq_len=256, micro=1)


def cases() -> Iterator[Case]:
    for precision in PRECISIONS:
        yield from _gpt2(precision)
        yield from _llama(precision)
        yield from _placed(precision)
        yield from _sharded(precision)
        yield from _updated_at_once(precision)
    for precision in (FP16, FP16_AUTOCAST):
        yield from _fp16(precision)
    for sharding in ("optimizer", "gradients", "parameters"):
        yield Case("deepspeed", 2, sharding=sharding, precision=FP16)


def _gpt2(precision: Any) -> Iterator[Case]:
    for checkpointing in ("none", *RECOMPUTED):
        yield Case(layers=6, precision=precision, checkpointing=checkpointing)
    for loss_chunk in ("auto", "none", 64):
        yield Case(vocab_size=4000, loss_chunk=loss_chunk, precision=precision)
    yield Case(accumulation=1, precision=precision)
    yield Case(seq_len=512, micro=1, precision=precision)
    yield Case(seq_len=32, micro=16, precision=precision)
    yield Case(layers=2, hidden=256, heads=8, precision=precision)
    yield Case(layers=12, hidden=64, heads=2, micro=8, precision=precision)
    yield Case(layers=12, vocab_size=8000, checkpointing="auto", precision=precision)
    yield Case(layers=2, vocab_size=50_257, micro=1, precision=precision)
    yield Case(dropout=0.1, precision=precision)
    yield Case(dropout=0.1, layers=6, seq_len=256, micro=2, checkpointing="auto", precision=precision)
    for checkpointing in ("none", "auto"):
        yield replace(GPT2_124M, checkpointing=checkpointing, precision=precision)


def _llama(precision: Any) -> Iterator[Case]:
    yield Case(hf={}, precision=precision)
    yield Case(hf={}, accumulation=1, seq_len=256, precision=precision)
    yield Case(hf={"num_hidden_layers": 6}, checkpointing="auto", precision=precision)
    yield Case(
        hf={"num_hidden_layers": 6}, checkpointing={"selective": {"ops": "cheap"}}, precision=precision
    )
    yield Case(hf={"tie_word_embeddings": True, "vocab_size": 8000}, precision=precision)


def _placed(precision: Any) -> Iterator[Case]:
    layers = 6
    for offload in ({"optimizer": "cpu"}, STATE, {"activations": "cpu"}, {**STATE, "activations": "cpu"}):
        yield Case(SIMULATED, layers=layers, offload=offload, precision=precision)
    yield Case(SIMULATED, layers=layers, manual=HALVES, precision=precision)
    yield Case(
        SIMULATED, layers=layers, manual=HALVES, offload=STATE, checkpointing="auto", precision=precision
    )


def _sharded(precision: Any) -> Iterator[Case]:
    for sharding in ("none", "optimizer", "gradients", "parameters"):
        if sharding != "none" or precision != BF16_WEIGHTS:  # DeepSpeed has no stage 0 there
            yield Case("deepspeed", 2, sharding=sharding, precision=precision)
            yield Case("deepspeed", 2, layers=4, hidden=256, heads=8, sharding=sharding, precision=precision)
            yield Case("deepspeed", 2, hf={}, sharding=sharding, precision=precision)
    yield Case(
        "deepspeed",
        2,
        layers=8,
        accumulation=1,
        sharding="gradients",
        checkpointing="auto",
        precision=precision,
    )


def _updated_at_once(precision: Any) -> Iterator[Case]:
    yield Case(layers=6, accumulation=1, micro=1, precision=precision, in_backward=True)
    yield Case(
        layers=6, accumulation=1, micro=1, checkpointing={"every": 1}, precision=precision, in_backward=True
    )
    yield Case(hf={}, accumulation=1, precision=precision, in_backward=True)
    yield replace(GPT2_124M, accumulation=1, checkpointing="auto", precision=precision, in_backward=True)
    yield Case(
        SIMULATED,
        layers=6,
        accumulation=1,
        offload={"optimizer": "cpu"},
        checkpointing="auto",
        precision=precision,
        in_backward=True,
    )


def _fp16(precision: Any) -> Iterator[Case]:
    yield Case(precision=precision)
    yield Case(layers=6, checkpointing="auto", precision=precision)
    yield Case(vocab_size=4000, loss_chunk="none", precision=precision)
    yield Case(hf={}, precision=precision)
    for offload in (STATE, {**STATE, "activations": "cpu"}):
        yield Case(SIMULATED, layers=6, offload=offload, precision=precision)
