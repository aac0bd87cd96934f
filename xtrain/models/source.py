"""From a spec to a model: the built-in presets, or a user's own `factory:`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtrain.contract import ModelSource
from xtrain.errors import RequestError
from xtrain.models.gpt2 import GPT2
from xtrain.models.init import initialise
from xtrain.models.loss import LossChunk, cross_entropy_sum
from xtrain.models.presets import dimensions
from xtrain.spec.tree import MemorySection, ModelSection, Spec


def model_source(spec: Spec, data_vocab_size: int) -> ModelSource:
    """What builds the model of `spec`, for data of that many symbols."""
    if spec.model.preset is not None:
        return PresetSource(spec, data_vocab_size)
    return FactorySource(spec)


class PresetSource:
    """A built-in model, its weights a function of (seed, parameter name)."""

    def __init__(self, spec: Spec, data_vocab_size: int) -> None:
        size = dimensions(spec)
        if spec.model.preset == "gpt2-nano" and spec.model.vocab_size is None:
            size = replace(size, vocab_size=data_vocab_size)
        if data_vocab_size > size.vocab_size:
            raise RequestError(
                f"model.vocab_size is {size.vocab_size}, but the data has {data_vocab_size} symbols; "
                f"set model.vocab_size to {data_vocab_size} or more"
            )
        self.size = size
        self.dropout = spec.model.dropout
        self.seed = spec.train.seed
        self.loss_chunk = _loss_chunk(spec)

    def build(self) -> nn.Module:
        with torch.device("meta"):  # torch's own initialisation would be thrown away
            model = GPT2(self.size, self.dropout, self.loss_chunk)
        model.to_empty(device="cpu")
        model.tie()
        initialise(model, self.seed, self.size.layers)
        return model

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2


class FactorySource:
    """A model that the user's function returns, with the weights that function drew.

    The function is called on the CPU with torch's seed set to `train.seed`; its module must map
    tokens [batch, seq] to logits [batch, seq, vocabulary], as a tensor, as an object with
    `.logits`, or as a tuple that begins with them.
    """

    def __init__(self, spec: Spec) -> None:
        self.seed = spec.train.seed
        self.section = spec.model

    def build(self) -> nn.Module:
        function = _find_factory(self.section)
        torch.manual_seed(self.seed)
        try:
            model = function(**self.section.args)
        except TypeError as error:
            raise RequestError(
                f"model.factory {self.section.factory} cannot be called with model.args "
                f"{self.section.args}: {error}"
            ) from error
        if not isinstance(model, nn.Module):
            raise RequestError(
                f"model.factory {self.section.factory} returned a {type(model).__name__}, "
                "expected a torch.nn.Module"
            )
        return LogitsLoss(model.float())

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2


class LogitsLoss(nn.Module):
    """Gives a model of logits the (tokens, targets) -> loss sum that engines call."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        output = self.model(tokens)
        logits = getattr(output, "logits", output[0] if isinstance(output, tuple) else output)
        if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != targets.shape:
            found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise RequestError(
                f"the model of model.factory returned {found} for tokens {tuple(tokens.shape)}; "
                "expected logits [batch, seq, vocabulary]"
            )
        return cross_entropy_sum(logits, targets)


def _find_factory(section: ModelSection) -> Callable[..., Any]:
    """Import `package.module:function`, also from the current directory, as `python -m` would."""
    assert section.factory is not None
    module_name, _, attribute = section.factory.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"model.factory {section.factory}: no module named {error.name!r} "
            f"(looked in {here} and in the installed packages)"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RequestError(f"model.factory {section.factory}: {module_name} has no function {attribute!r}")
    return function  # type: ignore[no-any-return]


def _loss_chunk(spec: Spec) -> LossChunk:
    return spec.memory.loss_chunk if isinstance(spec.memory, MemorySection) else "auto"
