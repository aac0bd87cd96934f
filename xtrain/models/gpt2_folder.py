"""The library's GPT-2 by the names of a preset: what differs is names, and how linear layers lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtrain.errors import RequestError
from xtrain.jsonfile import read_json
from xtrain.models.hf_folder import CONFIG
from xtrain.models.presets import Dimensions
from xtrain.spec.problems import shown

if TYPE_CHECKING:
    import torch

WRAPPER = "transformer."
"""In front of all names but those of a folder without a head, as OpenAI's weights come."""
GPT2_NAMES = {
    "stem.token_embedding": "wte",
    "stem.position_embedding": "wpe",
    "head.norm": "ln_f",
    "attention_norm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.expansion": "mlp.c_fc",
    "feed_forward.projection": "mlp.c_proj",
}
"""Modules of the presets and the library's GPT-2; its linear layers keep their weights transposed."""
SAME = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
"""What a config says, or leaves to the library, of a model that computes what a preset does."""
HEADS = 12
"""The library's own, where the config says nothing."""


def library_name(name: str) -> tuple[str, bool]:
    """Of a preset's tensor, less WRAPPER; and whether it lies transposed there."""
    module, _, kind = name.rpartition(".")
    if module in GPT2_NAMES:
        return f"{GPT2_NAMES[module]}.{kind}", False
    _, layer, inner = module.split(".", 2)
    return f"h.{layer}.{GPT2_NAMES[inner]}.{kind}", kind == "weight" and not inner.endswith("norm")


def is_gpt2(files: Mapping[str, Any]) -> bool:
    """Whether those are the library's names for GPT-2's tensors."""
    return any(f"{wrapper}wte.weight" in files for wrapper in ("", WRAPPER))


class OfGPT2:
    """Stored weights (xtrain/models/init_from.py) in a folder of the library's GPT-2."""

    def __init__(self, folder: Path, files: Mapping[str, Any], size: Dimensions) -> None:
        """RequestError where its config is of a model that computes something else with the same shapes."""
        self._files = files
        for key, found, expected in _differences(read_json(folder / CONFIG), size):
            raise RequestError(
                f"model.init_from: {folder / CONFIG}: {key}: found {shown(found)}, expected "
                f"{shown(expected)} for this preset; use model.hf: {folder} for the model as it is"
            )

    def form(self, name: str) -> tuple[str, tuple[int, ...]] | None:
        key, transposed = self._place(name)
        if key not in self._files:
            return None
        found = self._files[key].get_slice(key)
        shape = tuple(found.get_shape())
        return str(found.get_dtype()), shape[::-1] if transposed else shape

    def read(self, name: str) -> torch.Tensor:
        key, transposed = self._place(name)
        found: torch.Tensor = self._files[key].get_tensor(key)
        return found.t().contiguous() if transposed else found

    def _place(self, name: str) -> tuple[str, bool]:
        key, transposed = library_name(name)
        return key if key in self._files else f"{WRAPPER}{key}", transposed


def _differences(config: Mapping[str, Any], size: Dimensions) -> Iterator[tuple[str, Any, Any]]:
    """Key, what the config says, and what it would say of a preset of that size."""
    if (heads := config.get("n_head", HEADS)) != size.heads:
        yield "n_head", heads, size.heads
    yield from ((key, config[key], one) for key, one in SAME.items() if config.get(key, one) != one)
