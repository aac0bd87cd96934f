"""Tiny configs of the families that must work, as a config.json has them. Nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCABULARY = 257
WIDTH = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 256,
}
GROUPED = {**COMMON, **WIDTH, "num_key_value_heads": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, **COMMON},
    "llama": {**GROUPED},
    "mistral": {**GROUPED, "sliding_window": 8},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {**GROUPED, "head_dim": 8},
    "gpt_neox": {**COMMON, **WIDTH},
    "opt": {**COMMON, **WIDTH, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8},
    "cohere": {**GROUPED, "logit_scale": 0.5, "pad_token_id": None},
    "granite": {**GROUPED, "logits_scaling": 3.0},
    "phi": {**COMMON, **WIDTH},
}
"""Gemma-2 caps its logits, Cohere and Granite scale them, Phi's head has a bias; Mistral, Qwen-2 and
Gemma-2 look back 8 tokens only, the last two not in all layers."""


def write_config(folder: Path, family: str, **changes: Any) -> Path:
    """A folder with the config of a tiny model, and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": family, **FAMILIES[family], **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
