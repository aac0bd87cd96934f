"""What every measured program trains: the same model, batches and hyperparameters, in one folder.

The folder holds workload.json (for the hand-written loops), spec.yaml (the same, for xtrain) and
batches.npy: the batches in the order in which xtrain takes them, so that a hand-written loop only has
to read a memory map. That is the least that loading data can cost.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Precision = Literal["fp32", "bf16"]
HF_FOLDER = "hugging_face"
"""In a workload's folder: the same model as a config of the transformers library."""
SHARDING_BY_STAGE = {0: "none", 1: "optimizer", 2: "gradients", 3: "parameters"}


@dataclass(frozen=True)
class Workload:
    """A GPT-2 of some size under AdamW, warm-up and cosine, clipping and accumulation."""

    layers: int
    hidden: int
    heads: int
    context: int
    global_batch: int
    micro_batch: int
    steps: int
    precision: Precision = "fp32"
    zero_stage: int = 0
    """For DeepSpeed; the plain loop has no use for it."""
    vocab_size: int = 257
    positions: int = 1024
    lr: float = 1e-3
    warmup: int = 5
    min_ratio: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 1234

    @property
    def accumulation(self) -> int:
        return self.global_batch // self.micro_batch

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch * self.context

    def learning_rate(self, step: int) -> float:
        """Of the update with this 0-based index."""
        if step < self.warmup:
            return self.lr * step / self.warmup
        progress = (step - self.warmup) / (self.steps - self.warmup)
        wave = (1 + math.cos(math.pi * progress)) / 2
        return self.lr * (self.min_ratio + (1 - self.min_ratio) * wave)

    def spec(self) -> dict[str, Any]:
        """The same as an xtrain spec. The data is a formula: alike on every machine."""
        return {
            "model": {
                "preset": "gpt2-nano",
                "layers": self.layers,
                "hidden": self.hidden,
                "heads": self.heads,
                "positions": self.positions,
                "vocab_size": self.vocab_size,
            },
            "data": {"source": "synthetic", "seq_len": self.context},
            "batch": {"global": self.global_batch, "micro": self.micro_batch},
            "train": {"steps": self.steps, "seed": self.seed, "clip": self.clip},
            "optimizer": {
                "lr": self.lr,
                "betas": list(self.betas),
                "eps": self.eps,
                "weight_decay": self.weight_decay,
            },
            "schedule": {"name": "cosine", "warmup": self.warmup, "min_ratio": self.min_ratio},
            "precision": self.precision,
            "memory": {"sharding": SHARDING_BY_STAGE[self.zero_stage]},
        }

    def hugging_face_config(self) -> dict[str, Any]:
        """Without dropout, as xtrain's."""
        return {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": self.vocab_size,
            "n_positions": self.positions,
            "n_embd": self.hidden,
            "n_layer": self.layers,
            "n_head": self.heads,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            "use_cache": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }


SIZES = {
    "micro": Workload(2, 128, 4, context=128, global_batch=16, micro_batch=8, steps=80),
    "small": Workload(6, 384, 6, context=256, global_batch=8, micro_batch=4, steps=20),
}


def write(folder: Path, workload: Workload) -> None:
    """Lay down the files of `workload` in an empty `folder`."""
    import yaml

    from xtrain.data import open_data
    from xtrain.spec import load_spec

    (folder / "workload.json").write_text(json.dumps(asdict(workload)))
    (folder / "spec.yaml").write_text(yaml.safe_dump(workload.spec(), sort_keys=False))
    (folder / HF_FOLDER).mkdir()
    (folder / HF_FOLDER / "config.json").write_text(json.dumps(workload.hugging_face_config()))
    data = open_data(load_spec(folder / "spec.yaml"), show_progress=False)
    steps = [data.micro_batches(step, data_rank=0, data_size=1) for step in range(workload.steps)]
    np.save(folder / "batches.npy", [[(b.tokens, b.targets) for b in batches] for batches in steps])


def read(folder: Path) -> tuple[Workload, np.ndarray]:
    """The workload and its batches, int64 [steps, accumulation, 2, micro_batch, context], mapped.

    The 2 are tokens and targets.
    """
    fields = json.loads((folder / "workload.json").read_text())
    fields["betas"] = tuple(fields["betas"])
    batches = np.load(folder / "batches.npy", mmap_mode="c")  # private pages: torch wants them writable
    return Workload(**fields), batches
