"""The built-in models' sizes, and how many parameters a size has. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xtrain.spec.tree import Spec

POSITIONS = 1024
BYTES_VOCABULARY = 257
"""256 bytes and the separator."""
GPT2_VOCABULARY = 50_257


@dataclass(frozen=True)
class Dimensions:
    """The size of a GPT-2 style model."""

    layers: int
    hidden: int
    heads: int
    positions: int
    vocab_size: int


PRESETS: dict[str, Dimensions] = {
    "gpt2-nano": Dimensions(4, 128, 4, POSITIONS, BYTES_VOCABULARY),
    "gpt2": Dimensions(12, 768, 12, POSITIONS, GPT2_VOCABULARY),
    "gpt2-medium": Dimensions(24, 1024, 16, POSITIONS, GPT2_VOCABULARY),
    "gpt2-large": Dimensions(36, 1280, 20, POSITIONS, GPT2_VOCABULARY),
    "gpt2-xl": Dimensions(48, 1600, 25, POSITIONS, GPT2_VOCABULARY),
}


def dimensions(spec: Spec) -> Dimensions:
    """The preset's size with the spec's overrides; KeyError when the spec names no preset."""
    model = spec.model
    preset = PRESETS[model.preset or ""]
    return Dimensions(
        layers=model.layers or preset.layers,
        hidden=model.hidden or preset.hidden,
        heads=model.heads or preset.heads,
        positions=model.positions or preset.positions,
        vocab_size=model.vocab_size or preset.vocab_size,
    )


def fitted_dimensions(spec: Spec, data_vocab_size: int) -> Dimensions:
    """The same; gpt2-nano takes the vocabulary of its data, where the spec names none."""
    size = dimensions(spec)
    if spec.model.preset == "gpt2-nano" and spec.model.vocab_size is None:
        return replace(size, vocab_size=data_vocab_size)
    return size


def parameter_count(size: Dimensions) -> int:
    """Parameters of a model of that size, the head tied to the token embedding.

    A block has 12 h^2 weights (query, key, value, output, and two of 4 h^2), 13 h biases and norms.
    """
    h = size.hidden
    block = 12 * h * h + 13 * h
    return (size.vocab_size + size.positions) * h + size.layers * block + 2 * h
