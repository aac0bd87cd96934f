"""Our models as those of the transformers library: names, config, and whether they compute the same."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtrain.contract import StateReader
from xtrain.errors import RequestError
from xtrain.models.init_from import ADAPTED
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Relative; fp32 arithmetic in another order."""
PROBE_SEED = 1
SEQUENCES, TOKENS = 2, 16
"""Of the random input that both models are asked about."""

GPT2_NAMES = {
    "stem.token_embedding": "transformer.wte",
    "stem.position_embedding": "transformer.wpe",
    "head.norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "attention.query_key_value": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "feed_forward.expansion": "mlp.c_fc",
    "feed_forward.projection": "mlp.c_proj",
}
"""Modules of the presets and the library's GPT-2; its linear layers keep their weights transposed."""


class LibraryForm(ABC):
    """What a trained model looks like in the transformers library."""

    def __init__(self, spec: Spec, data_vocab_size: int) -> None:
        start = spec.model.model_copy(update={"init_from": None})
        self.spec = spec.model_copy(update={"model": start})
        self.source = model_source(self.spec, data_vocab_size)

    @abstractmethod
    def config(self) -> Any: ...

    @abstractmethod
    def convert(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Our name and tensor to the library's."""

    @abstractmethod
    def outputs(self, model: Any, library: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is compared, of our model and of the library's."""

    def write_config(self, folder: Path, dtype: str) -> None:
        config = self.config()
        config.dtype = dtype
        config.save_pretrained(folder)

    def difference(self, reader: StateReader, folder: Path, dtype: str) -> float:
        """Between our model with the checkpoint's weights, rounded as the folder's are, and the folder's."""
        import torch

        library = _transformers().AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
        model = self.source.build().eval()
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if (stored := reader.read(name, "buffer")) is not None:
                    rounded = stored.to(getattr(torch, dtype)) if stored.dtype == torch.float32 else stored
                    tensor.copy_(rounded)
            generator = torch.Generator().manual_seed(PROBE_SEED)
            vocabulary = library.config.get_text_config().vocab_size
            tokens = torch.randint(vocabulary, (SEQUENCES, TOKENS), generator=generator)
            ours, theirs = self.outputs(model, library.eval(), tokens)
        return float((ours - theirs).abs().max() / theirs.abs().max())


class PresetForm(LibraryForm):
    """A preset is GPT-2, in other words."""

    def config(self) -> Any:
        size: Any = self.source.size  # type: ignore[attr-defined]
        return _transformers().GPT2Config(
            vocab_size=size.vocab_size,
            n_positions=size.positions,
            n_embd=size.hidden,
            n_layer=size.layers,
            n_head=size.heads,
            bos_token_id=None,
            eos_token_id=None,
            architectures=["GPT2LMHeadModel"],
        )

    def convert(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        module, _, kind = name.rpartition(".")
        if module in GPT2_NAMES:
            return f"{GPT2_NAMES[module]}.{kind}", tensor
        _, layer, inner = module.split(".", 2)
        linear = kind == "weight" and not inner.endswith("norm")
        return f"transformer.h.{layer}.{GPT2_NAMES[inner]}.{kind}", tensor.t() if linear else tensor

    def outputs(self, model: Any, library: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(tokens), library(tokens).logits


class HuggingFaceForm(LibraryForm):
    """A model of the library has its own names; ours wraps it."""

    def config(self) -> Any:
        return self.source.config  # type: ignore[attr-defined]

    def convert(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name.removeprefix(ADAPTED), tensor

    def outputs(self, model: Any, library: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of token losses: ours makes no logits."""
        import torch.nn.functional as F

        logits = library(tokens).logits.flatten(0, 1).float()
        targets = tokens.roll(-1, dims=1)
        return model(tokens, targets), F.cross_entropy(logits, targets.flatten(), reduction="sum")


def library_form(spec: Spec, data_vocab_size: int) -> LibraryForm:
    """RequestError when the library has no such model."""
    _transformers()
    if spec.model.preset is not None:
        return PresetForm(spec, data_vocab_size)
    if spec.model.hf is not None:
        return HuggingFaceForm(spec, data_vocab_size)
    raise RequestError(
        f"model.factory {spec.model.factory} is no model of Hugging Face's; use --to safetensors"
    )


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as missing:
        raise RequestError("--to hf needs the transformers library: pip install 'xtrain[hf]'") from missing
