"""From a spec to a model: the built-in presets, a user's own `factory:`, or one of Hugging Face's.

torch is imported when a model is built, not before.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from xtrain.contract import ModelSource
from xtrain.errors import RequestError, XtrainError, described, is_about_memory
from xtrain.models.hf import HuggingFaceSource
from xtrain.models.init_from import PiecewiseStart, StoredStart
from xtrain.models.presets import fitted_dimensions
from xtrain.spec.tree import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from xtrain.models.gpt2 import GPT2


class NotedSource(ModelSource, Protocol):
    """A source that can say more of the model than its description."""

    @property
    def shape(self) -> tuple[int, int] | None:
        """(layers, width), where it tells them."""
        ...

    @property
    def content_hash(self) -> str | None:
        """Of what the spec only names the place of: a config; None where it says all."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What a person should know about the model that was built, a sentence each; after `build`."""
        ...

    @property
    def files(self) -> Mapping[str, bytes]:
        """By name, what its library wants beside the weights; after `build`."""
        ...

    @property
    def outline(self) -> nn.Module | str | None:
        """Of the model that was built, or why there is none; None before `build`, and of built-in models."""
        ...


def model_source(spec: Spec, data_vocab_size: int, resumed: bool = False) -> NotedSource:
    """What builds the model of `spec`, for data of that many symbols.

    `resumed`: its weights are a checkpoint's, so those that the spec names are not looked for.
    """
    source = _own_source(spec, data_vocab_size, resumed)
    if spec.model.init_from is None or resumed:
        return source
    if isinstance(source, PresetSource):
        return PiecewiseStart(source, spec.model.init_from)
    return StoredStart(source, spec.model.init_from)


def _own_source(spec: Spec, data_vocab_size: int, resumed: bool) -> NotedSource:
    if spec.model.preset is not None:
        return PresetSource(spec, data_vocab_size)
    if spec.model.hf is not None:
        return HuggingFaceSource(spec, data_vocab_size, resumed)
    return FactorySource(spec, data_vocab_size)


def without_numbers(spec: Spec) -> tuple[nn.Module, str]:
    """The module of a spec that is no preset, and its description, as far as shapes go.

    To be called where tensors are made without numbers: no weights are read, nothing is tried on the model.
    """
    source = HuggingFaceSource(spec, 0) if spec.model.hf is not None else FactorySource(spec, 0)
    model = source.skeleton() if isinstance(source, HuggingFaceSource) else source.build()
    return model, source.description


class PresetSource:
    """A built-in model, its weights a function of (seed, parameter name)."""

    notes = ()
    content_hash = None
    files: Mapping[str, bytes] = MappingProxyType({})
    outline = None

    def __init__(self, spec: Spec, data_vocab_size: int) -> None:
        size = fitted_dimensions(spec, data_vocab_size)
        if data_vocab_size > size.vocab_size:
            raise RequestError(
                f"model.vocab_size is {size.vocab_size}, but the data has {data_vocab_size} symbols; "
                f"set model.vocab_size to {data_vocab_size} or more"
            )
        self.size = size
        self.shape = (size.layers, size.hidden)
        self.description = (
            f"{spec.model.preset}, {size.layers} layers x {size.hidden}, vocabulary {size.vocab_size}"
        )
        self.dropout = spec.model.dropout
        self.seed = spec.train.seed
        self.loss_chunk = spec.techniques.loss_chunk

    def build(self) -> nn.Module:
        from xtrain.models.init import initialise

        model = self.skeleton().to_empty(device="cpu")
        model.tie()
        initialise(model, self.seed, self.size.layers)
        return model

    def skeleton(self) -> GPT2:
        """On the meta device: torch's own initialisation would be thrown away."""
        import torch

        from xtrain.models.gpt2 import GPT2

        with torch.device("meta"):
            return GPT2(self.size, self.dropout, self.loss_chunk)

    def weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        from xtrain.models.init import initial_weight

        return initial_weight(name, shape, self.seed, self.size.layers)

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2


class FactorySource:
    """A model that the user's function returns, with the weights that function drew.

    The function is called on the CPU, torch, Python and NumPy seeded with `train.seed`; its module must map
    tokens [batch, seq] to logits [batch, seq, vocabulary] (xtrain/models/adapter.py).
    """

    notes = ()
    files: Mapping[str, bytes] = MappingProxyType({})
    shape = None
    content_hash = None
    outline: nn.Module | str | None = None

    def __init__(self, spec: Spec, data_vocab_size: int) -> None:
        self.data_vocab_size = data_vocab_size
        self.seed = spec.train.seed
        self.factory = spec.model.factory or ""
        self.args = spec.model.args
        self.description = self.factory

    def build(self) -> nn.Module:
        import torch

        from xtrain.host_random import seed_host
        from xtrain.models.adapter import LogitsLoss
        from xtrain.models.outline import outline

        function = _find_factory(self.factory)
        torch.manual_seed(self.seed)
        seed_host(self.seed)
        try:
            inspect.signature(function).bind(**self.args)
        except TypeError as error:
            raise RequestError(
                f"model.factory {self.factory} cannot be called with model.args {self.args}: {error}"
            ) from error
        with _users_code(f"model.factory {self.factory} failed"):
            model = function(**self.args)
        if not isinstance(model, torch.nn.Module):
            raise RequestError(
                f"model.factory {self.factory} returned a {type(model).__name__}, expected a torch.nn.Module"
            )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise RequestError(f"model.factory {self.factory} returned a model with nothing to train in it")
        origin = f"model.factory {self.factory}"
        _require_numbers(model, origin)
        adapted = LogitsLoss(model.float(), origin, self.data_vocab_size)
        self.outline = outline(adapted)
        return adapted

    def decayed(self, name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2


def _require_numbers(model: nn.Module, origin: str) -> None:
    """RequestError where a weight or buffer has no numbers; in a build of shapes alone, none has any."""
    import torch
    from torch.nn.parameter import is_lazy

    of_shapes = torch.get_default_device().type == "meta"
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise RequestError(
                f"{origin} returned a model whose {name} has no shape yet; expected a whole one: call it "
                "once in the function, or use no lazy modules"
            )
        if tensor.is_meta and not of_shapes:
            raise RequestError(
                f"{origin} returned a model whose {name} is on the meta device, without numbers; expected "
                "all on the CPU"
            )


@contextmanager
def _users_code(what: str) -> Iterator[None]:
    """Whatever goes wrong inside is the user's to mend: told with its place, not as a traceback."""
    try:
        yield
    except XtrainError:
        raise
    except (Exception, SystemExit) as error:
        if is_about_memory(error):  # a full device is the engine's to tell
            raise
        raise RequestError(f"{what}: {described(error)}") from error


def _find_factory(factory: str) -> Callable[..., Any]:
    """Import `package.module:function`, also from the current directory, as `python -m` would."""
    module_name, _, attribute = factory.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with _users_code(f"model.factory {factory} cannot be imported"):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise RequestError(
                f"model.factory {factory}: no module named {error.name!r} "
                f"(looked in {here} and in the installed packages)"
            ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RequestError(f"model.factory {factory}: {module_name} has no function {attribute!r}")
    return function  # type: ignore[no-any-return]
