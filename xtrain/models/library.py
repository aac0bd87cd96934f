"""Our models as those of the transformers library: names, config, and whether they compute the same."""

from __future__ import annotations

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xtrain.checkpoints.format import ADAPTED, Reader
from xtrain.contract import StateReader
from xtrain.data.tokenizers import HuggingFaceTokenizer, load_tokenizer
from xtrain.errors import RequestError
from xtrain.models.gpt2_folder import WRAPPER, library_name
from xtrain.models.init_from import OfCheckpoint, misfits
from xtrain.models.source import model_source
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Relative; fp32 arithmetic in another order."""
PROBE_SEED = 1
SEQUENCES, TOKENS = 2, 16
"""Of the random input that both models are asked about."""


class LibraryForm(ABC):
    """What a trained model looks like in the transformers library."""

    def __init__(
        self, spec: Spec, data_vocab_size: int, folder: Path | None = None, reader: Reader | None = None
    ) -> None:
        """`folder` has the config, where that is not to be looked for at `model.hf`.

        RequestError unless the weights of `reader` fit the model, before it takes memory.
        """
        start = spec.model.model_copy(
            update={"init_from": None, "hf": str(folder) if folder else spec.model.hf}
        )
        self.spec = spec
        self.source = model_source(spec.model_copy(update={"model": start}), data_vocab_size, resumed=True)
        if reader is not None:
            _require_fit(self.source, reader)
        self.model = self.source.build().eval()

    @abstractmethod
    def config(self, dtype: str) -> Any:
        """For weights of this dtype."""

    @abstractmethod
    def convert(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Our name and tensor to the library's."""

    @abstractmethod
    def outputs(self, library: Any, tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What is compared, of our model and of the library's: logits [sequences, tokens, vocabulary], ..."""

    def kept(self, names: Iterable[str]) -> list[str]:
        """All but buffers that the model computes anew whenever it is built."""
        own = self.model.state_dict()
        return [name for name in names if name in own]

    def write_config(self, folder: Path, dtype: str) -> None:
        self.config(dtype).save_pretrained(folder)

    def write_companions(self, folder: Path) -> Iterator[str]:
        """The tokenizer, where the library knows it; yields what cannot be carried."""
        try:
            tokenizer = load_tokenizer(self.spec.data.tokenizer)
        except RequestError as error:
            yield f"the tokenizer: {error}"
            return
        if isinstance(tokenizer, HuggingFaceTokenizer):
            tokenizer.save(folder)
            _tell("the tokenizer", self.spec.data.tokenizer)
        else:
            yield f"the tokenizer: the library has none like data.tokenizer {self.spec.data.tokenizer}"

    def difference(self, reader: StateReader, folder: Path, dtype: str) -> float:
        """Between our model with the checkpoint's weights, rounded as the folder's are, and the folder's."""
        import torch

        library = _transformers().AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
        with torch.no_grad():
            for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
                if (stored := reader.read(name, "buffer")) is not None:
                    rounded = stored.to(getattr(torch, dtype)) if stored.dtype == torch.float32 else stored
                    tensor.copy_(rounded)
            generator = torch.Generator().manual_seed(PROBE_SEED)
            vocabulary = library.config.get_text_config().vocab_size
            tokens = torch.randint(vocabulary, (SEQUENCES, TOKENS), generator=generator)
            found = [_relative(*pair) for pair in self.outputs(library.eval(), tokens)]
        return max(found, key=lambda one: math.inf if math.isnan(one) else one)


class PresetForm(LibraryForm):
    """A preset is GPT-2, in other words."""

    def config(self, dtype: str) -> Any:
        size: Any = self.source.size  # type: ignore[attr-defined]
        return _transformers().GPT2Config(
            dtype=dtype,
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
        key, transposed = library_name(name)
        return f"{WRAPPER}{key}", tensor.t() if transposed else tensor

    def outputs(self, library: Any, tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield self.model(tokens), library(tokens).logits


class HuggingFaceForm(LibraryForm):
    """A model of the library has its own names; ours wraps it."""

    def config(self, dtype: str) -> Any:
        return self.source.config_of(dtype)  # type: ignore[attr-defined]

    def write_companions(self, folder: Path) -> Iterator[str]:
        yield from super().write_companions(folder)
        with suppress(OSError):  # not every model has one, and it may be gone
            _transformers().GenerationConfig.from_pretrained(self.spec.model.hf).save_pretrained(folder)
            _tell("generation settings", self.spec.model.hf)

    def convert(self, name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
        return name.removeprefix(ADAPTED), tensor

    def outputs(self, library: Any, tokens: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Logits of the model inside of ours, and the sum of token losses, for which ours makes none."""
        import torch.nn.functional as F

        theirs = library(tokens).logits.float()
        yield self.model.model(tokens).logits.float(), theirs  # type: ignore[operator]
        targets = tokens.roll(-1, dims=1)
        expected = F.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="sum")
        yield self.model(tokens, targets), expected


def _require_fit(source: Any, reader: Reader) -> None:
    """By shapes alone: a spec can ask for any size."""
    import torch

    with torch.device("meta"):
        wrong = next(misfits(source.skeleton(), OfCheckpoint(reader)), None)
    if wrong is not None:
        raise RequestError(
            f"the checkpoint's state.json has a spec of another model than its weights: found {wrong}; "
            "nothing was written. Its weights as they are: --to safetensors"
        )


def _tell(what: str, place: str | None) -> None:
    """The checkpoint says where; who exports it is to know."""
    print(f"note: {what} copied from {place}, which the checkpoint's spec names", file=sys.stderr)


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def library_form(
    spec: Spec, data_vocab_size: int, folder: Path | None = None, reader: Reader | None = None
) -> LibraryForm:
    """RequestError when the library has no such model, or it is not that of the weights in `reader`."""
    _transformers()
    if spec.model.preset is not None:
        return PresetForm(spec, data_vocab_size, reader=reader)
    if spec.model.hf is not None:
        return HuggingFaceForm(spec, data_vocab_size, folder, reader)
    raise RequestError(
        f"model.factory {spec.model.factory} is no model of Hugging Face's; use --to safetensors"
    )


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as missing:
        raise RequestError("--to hf needs the transformers library: pip install 'xtrain[hf]'") from missing
