"""The sizes of the built-in models, and what follows from them by arithmetic; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

GPT2_VOCAB_SIZE = 50257
BYTES_VOCAB_SIZE = 257
POSITIONS = 1024


@dataclass(frozen=True)
class Dimensions:
    """What decides the shapes of a GPT-2 model."""

    layers: int
    hidden: int
    heads: int
    positions: int
    vocab_size: int


PRESETS: dict[str, Dimensions] = {
    "gpt2-nano": Dimensions(4, 128, 4, POSITIONS, BYTES_VOCAB_SIZE),
    "gpt2": Dimensions(12, 768, 12, POSITIONS, GPT2_VOCAB_SIZE),
    "gpt2-medium": Dimensions(24, 1024, 16, POSITIONS, GPT2_VOCAB_SIZE),
    "gpt2-large": Dimensions(36, 1280, 20, POSITIONS, GPT2_VOCAB_SIZE),
    "gpt2-xl": Dimensions(48, 1600, 25, POSITIONS, GPT2_VOCAB_SIZE),
}


def dimensions(spec: Spec) -> Dimensions:
    """The preset of `spec` with its overrides.

    gpt2-nano has the vocabulary of bytes here: one that a tokenizer brings is known only with the
    data. Raises ValueError when the model is not a preset.
    """
    model = spec.model
    if model.preset is None:
        raise ValueError("only a preset's dimensions are known before it is built")
    given = {
        "layers": model.layers,
        "hidden": model.hidden,
        "heads": model.heads,
        "positions": model.positions,
        "vocab_size": model.vocab_size,
    }
    return replace(PRESETS[model.preset], **{name: size for name, size in given.items() if size is not None})


def parameter_count(size: Dimensions) -> int:
    """Every parameter once; the head is tied to the token embedding."""
    width = size.hidden
    embeddings = (size.vocab_size + size.positions) * width
    norm = 2 * width
    attention = (width * 3 * width + 3 * width) + (width * width + width)
    feed_forward = (width * 4 * width + 4 * width) + (4 * width * width + width)
    block = 2 * norm + attention + feed_forward
    return embeddings + size.layers * block + norm
